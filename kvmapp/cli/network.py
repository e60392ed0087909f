"""Virtual networks: virsh's net-* verbs.

net-update takes `host web mac=... ipv4=...` and `forward http port=8080 to=web` in the place of virsh's pieces of XML.
"""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import argument, flag, value, verb
from kvmapp.client import of_network
from kvmapp.errors import UsageError

NETWORK = argument("network", "the network's name or UUID", complete="network")
INACTIVE = flag("inactive", "of an active network: what its next start will take")


@verb("net-list", "list networks",
      flag("inactive", "those that are not active"), flag("all", "those that are active, and those that are not"),
      flag("persistent", "those with a file"), flag("transient", "those without"),
      flag("autostart", "those marked by autostart"), flag("no-autostart", "those that are not"),
      flag("uuid", "print UUIDs only"), flag("name", "print names only"), flag("table", "print the table (the default)"),
      exclusive=(("table", "name"), ("table", "uuid"), ("name", "uuid")))
def net_list(session, given):
    networks = [one for one in session.daemon.get("/v1/networks")["networks"]
                if (given.all or one["active"] != given.inactive)
                and (given.persistent == given.transient or one["persistent"] == given.persistent)
                and (given.autostart == given.no_autostart or one["autostart"] == given.autostart)]
    session.answer({"networks": networks}, lambda: list_text(networks, given, header=not session.quiet))


def list_text(networks: list[dict], given, header: bool) -> str:
    if given.name or given.uuid:
        return "".join(f"{render.or_dash(one['name' if given.name else 'uuid'])}\n" for one in networks)
    rows = [[one["name"], f"broken ({one['text']})" if one["state"] == "broken" else one["state"], render.yes_no(one["autostart"]),
             render.yes_no(one["persistent"])] for one in networks]
    return render.table(["Name", "State", "Autostart", "Persistent"], rows, header=header)


@verb("net-start", "start a network", argument("network", "its name or UUID", complete="inactive-network"),
      failure="Failed to start network {network}")
def net_start(session, given):
    with session.wait_with(f"starting network {given.network}"):
        changed = session.daemon.post(of_network(given.network, "start"))
    session.done(changed, f"Network {changed['network']['name']} started")


@verb("net-destroy", "stop a network", argument("network", "its name or UUID", complete="active-network"),
      text="Its bridge, rules, DHCP and DNS go. Its file stays, and so do guests that are in it, without a network until it is started "
           "again.",
      failure="Failed to destroy network {network}")
def net_destroy(session, given):
    changed = session.daemon.post(of_network(given.network, "destroy"))
    session.done(changed, f"Network {changed['network']['name']} destroyed")


@verb("net-define", "define a network, or change it, from a file",
      argument("file", "a network's INI file, see kvmapp-network(5); - is standard input", complete="file"),
      failure="Failed to define network from {file}")
def net_define(session, given):
    from kvmapp.cli.definition import path_of, read_text
    defined = session.daemon.post("/v1/networks", text=read_text(given.file), file=path_of(given.file))
    session.done(defined, f"Network {defined['network']['name']} defined from {given.file}")
    if defined["made"]:
        session.note(f"made: {', '.join(defined['made'])}")


@verb("net-undefine", "remove a network's file", NETWORK, failure="Failed to undefine network {network}")
def net_undefine(session, given):
    undefined = session.daemon.delete(of_network(given.network))
    lines = [f"Network {undefined['name']} has been undefined"]
    if undefined["still_active"]:
        lines.append("it is still active, and gone when it is destroyed")
    session.done(undefined, "\n".join(lines))


@verb("net-dumpconf", "the configuration of a network", NETWORK, INACTIVE)
def net_dumpconf(session, given):
    config = session.daemon.get(of_network(given.network, "config"), inactive=given.inactive)
    session.answer(config, config["text"])


@verb("net-dumpxml", "the same as net-dumpconf: an INI file, no XML", NETWORK, INACTIVE)
def net_dumpxml(session, given):
    net_dumpconf(session, given)
    session.note("note: kvmapp's configuration is an INI file; net-dumpconf shows it too")


@verb("net-edit", "change a network's file in an editor", NETWORK,
      text="The file is saved when the editor ends and the text holds no error; nothing is changed otherwise. An active network takes "
           "the changes at its next start; net-update changes it at once.",
      failure="Failed to edit network {network}")
def net_edit(session, given):
    from kvmapp.cli.editing import edit_config
    saved = edit_config(session, of_network(given.network, "config"), given.network)
    if saved is None:
        session.done({}, f"Network {given.network} configuration not changed.")
    else:
        session.done(saved, f"Network {saved['network']['name']} configuration edited.")


@verb("net-info", "what a network is", NETWORK)
def net_info(session, given):
    one = session.daemon.get(of_network(given.network))
    lines: list[tuple[str, object]] = [
        ("Name", one["name"]), ("UUID", render.or_dash(one["uuid"])), ("Active", render.yes_no(one["active"])),
        ("Persistent", render.yes_no(one["persistent"])), ("Autostart", render.yes_no(one["autostart"])),
        ("Bridge", render.or_dash(one["bridge"]))]
    lines += [(title, one[key]) for title, key in (("Mode", "mode"), ("IPv4", "ipv4"), ("IPv6", "ipv6"), ("Broken", "text")) if one[key]]
    lines += [("Warning", warning) for warning in one["warnings"]]
    session.answer(one, lambda: render.pairs(lines, 16))


@verb("net-name", "the name of a network", argument("network", "its UUID", complete="network"))
def net_name(session, given):
    one = session.daemon.get(of_network(given.network))
    session.answer(one, f"{one['name']}\n")


@verb("net-uuid", "the UUID of a network", NETWORK)
def net_uuid(session, given):
    one = session.daemon.get(of_network(given.network))
    session.answer(one, f"{render.or_dash(one['uuid'])}\n")


@verb("net-autostart", "start a network with the host, or no longer", NETWORK, flag("disable", "no longer"),
      text="A link in /etc/kvmapp/networks/autostart marks the network. Networks are started before domains.",
      failure="Failed to change the autostart mark of network {network}")
def net_autostart(session, given):
    changed = session.daemon.post(of_network(given.network, "autostart"), enabled=not given.disable)
    session.done(changed, f"Network {changed['network']['name']} {'unmarked' if given.disable else 'marked'} as autostarted")


@verb("net-dhcp-leases", "the addresses that a network has lent", NETWORK, value("mac", "to this card only"),
      failure="Failed to get leases info for {network}")
def net_dhcp_leases(session, given):
    leases = session.daemon.get(of_network(given.network, "leases"), mac=given.mac and given.mac.lower())["leases"]
    rows = [[render.clock(one["expires"]) if one["expires"] else "never", render.or_dash(one["mac"]), one["protocol"],
             f"{one['address']}/{one['prefix']}", render.or_dash(one["hostname"]), render.or_dash(one["client"])] for one in leases]
    titles = ["Expiry Time", "MAC address", "Protocol", "IP address", "Hostname", "Client ID or DUID"]
    session.answer({"leases": leases}, lambda: render.table(titles, rows, header=not session.quiet))


@verb("net-update", "change fixed addresses and forwards of a network, at once", NETWORK,
      argument("command", "add, modify or delete", choices=("add", "modify", "delete")),
      argument("section", "host or forward", choices=("host", "forward")),
      argument("name", "the host's or forward's name"),
      value("settings", "key=value, as in the file; an empty value removes it", many=True),
      flag("config", "in its file only"), flag("live", "of the active network only"),
      text="Without --config and --live both are changed, as far as they are there. Guests notice nothing: established connections "
           "stay. Examples: net-update default add host web mac=52:54:00:7f:0d:cb ipv4=192.168.122.10; net-update default add forward "
           "http port=8080 to=web to_port=80.",
      failure="Failed to update network {network}")
def net_update(session, given):
    settings = {}
    for word in given.settings:
        key, found, text = word.partition("=")
        if not found:
            raise UsageError(f"'{word}' is not key=value", "for example: mac=52:54:00:7f:0d:cb")
        settings[key] = text
    request = {"command": given.command, "section": given.section, "name": given.name, "settings": settings,
               **{key: True for key in ("live", "config") if getattr(given, key)}}
    changed = session.daemon.post(of_network(given.network, "update"), **request)
    where = "live state" if given.live and not given.config else "persistent config" if given.config and not given.live else \
        "persistent config and live state" if changed["network"]["active"] else "persistent config"
    session.done(changed, f"Updated network {changed['network']['name']} {where}")
