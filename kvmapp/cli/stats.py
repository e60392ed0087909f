"""domstats and dommemstat: counters as key=value lines, under libvirt's keys (virConnectGetAllDomainStats) where it has them.

Ours beside those: `vm.exits.REASON`, by the reasons of KVM_RUN. Left out: perf, iothread, memory bandwidth and dirty rate groups.
"""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Lines = Iterator[tuple[str, object]]

# virDomainState and the reasons of each state, in the order of their numbers (libvirt-domain.h).
STATES = ("no state", "running", "idle", "paused", "in shutdown", "shut off", "crashed", "pmsuspended")
REASONS = {
    "running": ("unknown", "booted", "migrated", "restored", "from snapshot", "unpaused", "migration canceled", "save canceled",
                "event wakeup", "crashed", "post-copy"),
    "paused": ("unknown", "user", "migrating", "saving", "dumping", "I/O error", "watchdog", "from snapshot", "shutting down",
               "creating snapshot", "crashed", "starting up"),
    "in shutdown": ("unknown", "user"),
    "shut off": ("unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot", "daemon"),
    "crashed": ("unknown", "panicked"),
}
# virsh's tags, and whether it shows them in KiB.
MEMORY_TAGS = {"swap_in": True, "swap_out": True, "major_fault": False, "minor_fault": False, "unused": True, "available": True,
               "usable": True, "last_update": False, "disk_caches": True, "hugetlb_pgalloc": False, "hugetlb_pgfail": False, "rss": True}
VCPU_STATES = {"offline": 0, "running": 1, "blocked": 2}
# Our counters under libvirt's names; any other keeps its own, with dots.
DISK_KEYS = {"rd_reqs": "rd.reqs", "rd_bytes": "rd.bytes", "rd_ns": "rd.times", "wr_reqs": "wr.reqs", "wr_bytes": "wr.bytes",
             "wr_ns": "wr.times", "fl_reqs": "fl.reqs", "fl_ns": "fl.times", "source": "path"}
INTERFACE_KEYS = {"target": "name", "rx_packets": "rx.pkts", "tx_packets": "tx.pkts", "rx_errors": "rx.errs", "tx_errors": "tx.errs",
                  "rx_drop": "rx.drop", "tx_drop": "tx.drop"}
GROUPS = ("state", "cpu_total", "balloon", "vcpu", "interface", "block", "vm")


@verb("domstats", "the counters of one, several or all domains",
      flag("state", "the state group"), flag("cpu-total", "time of all its threads"), flag("balloon", "its memory"),
      flag("vcpu", "each of its vCPUs, with what KVM counts of it"),
      flag("interface", "its network interfaces"), flag("block", "its disks"),
      flag("vm", "its exits by reason"),
      flag("list-active", "of domains that run"), flag("list-inactive", "of domains that do not"),
      flag("list-persistent", "of domains with a file"), flag("list-transient", "of domains without one"),
      flag("list-running", "of those that are running"), flag("list-paused", "of those that are paused"),
      flag("list-shutoff", "of those that are shut off"), flag("list-other", "of those in other states"),
      flag("raw", "accepted for virsh's sake"), flag("enforce", "accepted for virsh's sake: every group is there"),
      flag("nowait", "accepted for virsh's sake: nothing here waits for a job"),
      value("domain", "which ones (default: all)", many=True, complete="domain"))
def domstats(session, given):
    found = [session.daemon.get(of(name, "stats")) for name in given.domain] if given.domain else listed(session, given)
    groups = [group for group in GROUPS if getattr(given, group)] or GROUPS
    session.answer({"domains": found}, lambda: "\n".join(text_of(stats, groups) for stats in found))


@verb("dommemstat", "a domain's memory, as the host and the guest see it", domain(),
      text="Sizes are in KiB. What the guest tells needs [balloon] in the domain's file and a driver for it in the guest; it is asked anew "
           "each time. unused is free, available all that its kernel manages, usable what programs could get.",
      failure="Failed to get memory statistics for domain {domain}")
def dommemstat(session, given):
    stats = session.daemon.get(of(given.domain, "stats"))
    balloon = stats["balloon"]
    if balloon is None:
        raise Unsupported(f"Domain '{stats['name']}' is not running, or has no balloon that could tell",
                          "start it; add [balloon] to its file")
    lines = [("actual", balloon["current"] // render.KIB), *memory_facts(balloon)]
    session.answer(balloon, lambda: "".join(f"{tag} {fact}\n" for tag, fact in lines))


def memory_facts(balloon: dict) -> Lines:
    for tag, is_size in MEMORY_TAGS.items():
        fact = balloon.get(tag)
        if fact is not None:
            yield tag, fact // render.KIB if is_size else fact


def listed(session, given) -> list[dict]:
    """The chosen ones of all, running ones first."""
    found = session.daemon.get("/v1/stats", all=True)["domains"]
    states = [state for key, names in (("list_running", ["running"]), ("list_paused", ["paused"]), ("list_shutoff", ["shut off"]),
                                       ("list_other", ["in shutdown", "crashed", "no response", "broken"]))
              for state in names if getattr(given, key)]
    if given.list_active != given.list_inactive:
        found = [stats for stats in found if (stats["id"] is not None) == given.list_active]
    if given.list_persistent != given.list_transient:
        persistent = {one["name"] for one in session.daemon.get("/v1/domains")["domains"] if one["persistent"]}
        found = [stats for stats in found if (stats["name"] in persistent) == given.list_persistent]
    return [stats for stats in found if not states or stats["state"] in states]


def text_of(stats: dict, groups) -> str:
    makers = {"state": state_lines, "cpu_total": cpu_lines, "balloon": balloon_lines, "vcpu": vcpu_lines,
              "interface": interface_lines, "block": block_lines, "vm": exit_lines}
    lines = [f"  {key}={render.plain(str(fact))}\n" for group in groups for key, fact in makers[group](stats)]
    return f"Domain: '{stats['name']}'\n" + "".join(lines)


def state_lines(stats: dict) -> Lines:
    state, reason = stats["state"], stats["reason"]
    known = REASONS.get(state, ())
    yield "state.state", STATES.index(state) if state in STATES else 0
    yield "state.reason", known.index(reason) if reason in known else 0


def cpu_lines(stats: dict) -> Lines:
    for key, name in (("cpu_time_ns", "time"), ("cpu_user_ns", "user"), ("cpu_system_ns", "system")):
        if stats[key] is not None:
            yield f"cpu.{name}", stats[key]


def balloon_lines(stats: dict) -> Lines:
    """Sizes are in KiB."""
    balloon = stats["balloon"]
    if balloon:
        yield "balloon.current", balloon["current"] // render.KIB
        yield "balloon.maximum", balloon["maximum"] // render.KIB
        for tag, fact in memory_facts(balloon):
            yield f"balloon.{tag.replace('last_update', 'last-update')}", fact


def vcpu_lines(stats: dict) -> Lines:
    vcpus = stats["vcpus"]
    if vcpus:
        yield "vcpu.current", len(vcpus)
        yield "vcpu.maximum", len(vcpus)
    for vcpu in vcpus:
        yield f"vcpu.{vcpu['number']}.state", VCPU_STATES.get(vcpu["state"], 0)
        yield f"vcpu.{vcpu['number']}.time", vcpu["cpu_time_ns"]
        for name, count in vcpu["kvm"].items():
            yield f"vcpu.{vcpu['number']}.{name}", count


def interface_lines(stats: dict) -> Lines:
    return numbered("net", stats["interfaces"], INTERFACE_KEYS, without=("index", "mac"))


def block_lines(stats: dict) -> Lines:
    return numbered("block", stats["disks"], DISK_KEYS)


def numbered(group: str, parts: list[dict], keys: dict[str, str], without: tuple[str, ...] = ()) -> Lines:
    if parts:
        yield f"{group}.count", len(parts)
    for number, part in enumerate(parts):
        for key, count in part.items():
            if count is not None and key not in without:
                yield f"{group}.{number}.{keys.get(key, key.replace('_', '.'))}", count


def exit_lines(stats: dict) -> Lines:
    for reason, count in sorted(stats["exits"].items()):
        yield f"vm.exits.{reason}", count
