"""The host's own network devices: virsh's iface-* verbs, as far as a host without libvirt's interface files has a use for them."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import NUMBER, argument, flag, value, verb
from kvmapp.client import escape
from kvmapp.errors import UsageError

INTERFACE = argument("interface", "its name or MAC address", complete="host-interface")
TIMEOUT = value("timeout", "seconds in which it wants to be confirmed (30)", kind=NUMBER, named=True)


@verb("iface-list", "list the host's network devices", flag("inactive", "those that are down"),
      flag("all", "those that are up, and the others"))
def iface_list(session, given):
    found = [one for one in known(session) if given.all or one["active"] != given.inactive]
    rows = [[one["name"], "active" if one["active"] else "inactive", one["mac"] or ""] for one in found]
    session.answer({"interfaces": found}, lambda: render.table(["Name", "State", "MAC Address"], rows, header=not session.quiet))


@verb("iface-name", "the name of one of the host's network devices", argument("interface", "its MAC address"))
def iface_name(session, given):
    one = find(session, given.interface)
    session.answer(one, f"{one['name']}\n")


@verb("iface-mac", "the MAC address of one of the host's network devices", argument("interface", "its name", complete="host-interface"))
def iface_mac(session, given):
    one = find(session, given.interface)
    session.answer(one, f"{one['mac'] or '-'}\n")


@verb("iface-dumpconf", "what one of the host's network devices is", INTERFACE)
def iface_dumpconf(session, given):
    one = find(session, given.interface)
    lines = [("name", one["name"]), ("type", one["type"]), ("mac", render.or_dash(one["mac"])), ("mtu", one["mtu"]),
             ("state", "active" if one["active"] else "inactive"), ("bridge", one["bridge"]), ("ports", ", ".join(one["ports"])),
             ("addresses", ", ".join(one["addresses"]))]
    session.answer(one, "".join(f"{key} = {text}\n" for key, text in lines if text))


@verb("iface-bridge", "make a bridge with one of the host's network devices in it",
      value("interface", "the device", complete="host-interface"), value("bridge", "the new bridge's name"), TIMEOUT,
      flag("confirm", "keep what was changed"), flag("undo", "take back at once what was changed"),
      flag("no-stp", "accepted for virsh's sake: these bridges have no STP"),
      text="The bridge takes over the device's MAC address, addresses and routes; connections stay. Unless iface-bridge --confirm is said "
           "in time, everything is put back as it was: so a host that cannot be reached any more comes back by itself. It lasts until the "
           "host's next boot; the distribution's network configuration is not touched.",
      failure="Failed to change the host's network", exclusive=(("confirm", "undo"),))
def iface_bridge(session, given):
    if given.confirm or given.undo:
        answer = session.daemon.post(f"/v1/interfaces/{'confirm' if given.confirm else 'undo'}")
        session.done(answer, f"{'Kept' if given.confirm else 'Undone'}: {answer['what']}")
        return
    if not (given.interface and given.bridge):
        raise UsageError("iface-bridge wants <interface> and <bridge>, or --confirm, or --undo", "kvmappctl iface-bridge eth0 br0")
    device = find(session, given.interface)["name"]
    changed = session.daemon.post(f"/v1/interfaces/{escape(device)}/bridge", bridge=given.bridge, **timeout(given))
    session.done(changed, f"Created bridge {changed['bridge']} with attached device {changed['device']}\n"
                          f"Bridge interface {changed['bridge']} started")
    tell(session, changed)


@verb("iface-unbridge", "take the host's network device out of its bridge, and the bridge away",
      argument("bridge", "the bridge", complete="host-interface"), TIMEOUT,
      text="The way back from iface-bridge: confirmed, or undone by itself, as there.",
      failure="Failed to change the host's network")
def iface_unbridge(session, given):
    changed = session.daemon.post(f"/v1/interfaces/{escape(given.bridge)}/unbridge", **timeout(given))
    session.done(changed, f"Device {changed['device']} un-attached from bridge {changed['bridge']}\nInterface {changed['device']} started")
    tell(session, changed)


def tell(session, changed: dict) -> None:
    session.note(f"undone in {changed['timeout']:.0f} s unless you say: kvmappctl iface-bridge --confirm")


def timeout(given) -> dict[str, int]:
    return {} if given.timeout is None else {"timeout": given.timeout}


def known(session) -> list[dict]:
    return session.daemon.get("/v1/interfaces")["interfaces"]


def find(session, reference: str) -> dict:
    """By name, or by MAC address. Raises UsageError, in virsh's words."""
    there = known(session)
    found = next((one for one in there if reference in (one["name"], one["mac"]) or reference.lower() == one["mac"]), None)
    if found is None:
        raise UsageError(f"failed to get interface '{reference}'", f"there are: {', '.join(one['name'] for one in there)}")
    return found
