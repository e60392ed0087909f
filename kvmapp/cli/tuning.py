"""Where a domain runs and what it may take of the host: vcpupin, emulatorpin, numatune, schedinfo, memtune."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.definition import scope
from kvmapp.cli.parse import size
from kvmapp.cli.table import NUMBER, domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import DomainNotRunning, UsageError

SCOPE = (flag("config", "in its file, for its next start"), flag("live", "of the running domain"),
         flag("current", "of the running domain if it runs, else in its file"))
NOT_BOTH = (("live", "current"), ("config", "current"))
CPULIST = "the host's CPUs: 0-3,^2; r is all of them"
# virsh's names of the scheduler's parameters, and where they stand in the file.
SCHEDULER = {"cpu_shares": "shares", "vcpu_period": "period", "vcpu_quota": "quota", "global_period": "global_period",
             "global_quota": "global_quota"}
LIMITS = ("hard_limit", "soft_limit", "swap_hard_limit")


@verb("vcpupin", "show or change on which of the host's CPUs a vCPU runs", domain(),
      value("vcpu", "this one only; all of them when left out", kind=NUMBER), value("cpulist", CPULIST), *SCOPE,
      exclusive=NOT_BOTH)
def vcpupin(session, given):
    if given.cpulist is not None:
        if given.vcpu is None:
            raise UsageError("vcpupin: Missing vCPU number in pin mode.", f"kvmappctl vcpupin {given.domain} 0 {given.cpulist}")
        change(session, given, {f"vcpu {given.vcpu}": {"cpuset": cpus(given.cpulist)}})
        return
    pins = shown(session, given)["vcpus"]
    if given.vcpu is not None:
        pins = [pin for pin in pins if pin["number"] == given.vcpu]
        if not pins:
            raise UsageError("vcpupin: vCPU index out of range.", f"kvmappctl vcpucount {given.domain}")
    session.answer({"vcpus": pins}, lambda: render.table(("VCPU", "CPU Affinity"), [(str(pin["number"]), pin["cpus"]) for pin in pins]))


@verb("emulatorpin", "show or change on which of the host's CPUs all but a domain's vCPUs runs", domain(), value("cpulist", CPULIST),
      *SCOPE, text="Control and I/O threads of the domain's process.", exclusive=NOT_BOTH)
def emulatorpin(session, given):
    if given.cpulist is not None:
        change(session, given, {"cputune": {"emulatorpin": cpus(given.cpulist)}})
        return
    where = shown(session, given)["emulator"]
    session.answer({"emulator": where}, f"emulator: CPU Affinity\n----------------------------------\n       *: {where}\n")


def cpus(cpulist: str) -> str:
    """virsh's r takes a pin away."""
    if not cpulist:
        raise UsageError("Failed to get option 'cpulist': Option argument is empty")
    return "" if cpulist == "r" else cpulist


@verb("numatune", "show or change from which NUMA nodes a domain's memory comes", domain(),
      value("mode", "strict, preferred or interleave", choices=("strict", "preferred", "interleave")),
      value("nodeset", "the host's nodes: 0-1; an empty one takes the tuning away"), *SCOPE,
      text="The memory of a running guest stays where it is: a change is for the next start, with --config.", exclusive=NOT_BOTH)
def numatune(session, given):
    wanted = {key: getattr(given, key) for key in ("mode", "nodeset") if getattr(given, key) is not None}
    if wanted:
        if "nodeset" not in wanted and not shown(session, given)["numa_nodeset"]:
            raise UsageError("numatune: --nodeset is missing: the domain has no nodes yet", "kvmappctl nodeinfo tells how many there are")
        change(session, given, {"numatune": wanted})
        return
    tuning = shown(session, given)
    show(session, {key: tuning[key] for key in ("numa_mode", "numa_nodeset")})


@verb("schedinfo", "show or change how much CPU time a domain gets", domain(), *SCOPE,
      value("weight", "of Xen's scheduler only", named=True), value("cap", "of Xen's scheduler only", named=True),
      value("set", "NAME=VALUE: " + ", ".join(SCHEDULER), many=True),
      text="cpu_shares counts against other domains (1024 is usual); each vCPU may run vcpu_quota of every vcpu_period microseconds, the "
           "domain as a whole global_quota of every global_period; a quota of -1 is no limit.", exclusive=NOT_BOTH)
def schedinfo(session, given):
    wanted = dict(parameter(word) for word in given.set)
    for key in ("weight", "cap"):
        if getattr(given, key) is not None:
            parameter(f"{key}={getattr(given, key)}")
    if wanted:
        warn(session, change(session, given, {"cputune": wanted}, quiet=True))
    tuning = shown(session, given)
    show(session, {"Scheduler": "posix", **{name: tuning[name] for name in SCHEDULER}})


def parameter(word: str) -> tuple[str, str]:
    """cpu_shares=2048 as a setting of the file and its text."""
    name, equals, text = word.partition("=")
    if name not in SCHEDULER or not equals:
        raise UsageError(f"invalid scheduler option: {name if equals else word}", f"NAME=VALUE, with one of {', '.join(SCHEDULER)}")
    text = text.strip()
    if name.endswith("_quota") and text.startswith("-") and text[1:].isdigit():
        text = "-1"                     # any negative one is no limit
    return SCHEDULER[name], "" if text == "0" else text


HARD = value("hard-limit", "the most memory that its process may take: KiB, or with a unit; -1 is no limit")
SOFT = value("soft-limit", "what it is pushed back to when the host is short of memory")
SWAP = value("swap-hard-limit", "the most memory and swap together")


@verb("memtune", "show or change how much of the host's memory a domain may take", domain(), HARD, SOFT, SWAP,
      value("min-guarantee", "not kept here"), *SCOPE, exclusive=NOT_BOTH)
def memtune(session, given):
    if given.min_guarantee is not None:
        raise UsageError("--min-guarantee: no memory is guaranteed to a domain here", "prealloc and locked in its file hold it")
    texts = {option.key: limit_text(option, getattr(given, option.key)) for option in (HARD, SOFT, SWAP)
             if getattr(given, option.key) is not None}
    if texts:
        change(session, given, {"memtune": texts})
        return
    tuning = shown(session, given)
    limits = {key: tuning[key] for key in LIMITS}
    show(session, {key: "unlimited" if limit is None else limit // render.KIB for key, limit in limits.items()}, limits)


def limit_text(option, text: str) -> str:
    """As in the file; nothing for no limit."""
    return "" if text.strip() == "-1" else f"{size(option, text)} B"


# What they share.

def shown(session, given) -> dict:
    """What holds of the running domain, or what its file says."""
    if given.live and given.config:
        raise UsageError("cannot query both live and config at once")
    if given.live and session.daemon.get(of(given.domain))["id"] is None:
        raise DomainNotRunning("Requested operation is not valid: domain is not running")
    return session.daemon.get(of(given.domain, "tuning"), inactive=given.config)


def show(session, lines: dict[str, object], data: dict | None = None) -> None:
    session.answer(data or lines, "".join(f"{name:<15}: {text}\n" for name, text in lines.items()))


def change(session, given, settings: dict[str, dict[str, str]], quiet: bool = False) -> dict:
    changed = session.daemon.post(of(given.domain, "tuning"), settings=settings, **scope(given))
    if not quiet:
        session.done(changed, "")
    return changed


def warn(session, changed: dict) -> None:
    for warning in changed["warnings"]:
        session.complain(f"warning: {warning}")
