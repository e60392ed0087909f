"""Memory and vCPUs of a domain: setmem, setmaxmem, setvcpus, vcpucount, vcpuinfo."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.definition import config_of, scope
from kvmapp.cli.table import NUMBER, SIZE, argument, domain, flag, verb
from kvmapp.client import of
from kvmapp.cpuset import ranges
from kvmapp.errors import DomainNotRunning

SCOPE = (flag("config", "in its file, for its next start"), flag("live", "of the running domain"),
         flag("current", "of the running domain if it runs, else in its file"))
NOT_BOTH = (("live", "current"), ("config", "current"))


@verb("setmem", "change how much memory the guest may use", domain(),
      argument("size", "how much: a number of KiB, or one with its unit (512M, 2GiB)", kind=SIZE), *SCOPE,
      text="While the domain runs, its balloon takes memory from the guest and gives it back: [balloon] in its file makes one.",
      failure="Failed to change the memory of domain '{domain}'", exclusive=NOT_BOTH)
def setmem(session, given):
    with session.wait_with(f"waiting for the balloon of {given.domain}", given.domain):
        changed = session.daemon.post(of(given.domain, "memory"), bytes=given.size, **scope(given))
    session.done(changed, "")


@verb("setmaxmem", "change a domain's memory", domain(),
      argument("size", "how much: a number of KiB, or one with its unit (512M, 2GiB)", kind=SIZE), *SCOPE,
      failure="Failed to change the memory of domain '{domain}'", exclusive=NOT_BOTH)
def setmaxmem(session, given):
    session.done(session.daemon.post(of(given.domain, "memory"), bytes=given.size, maximum=True, **scope(given)), "")


@verb("setvcpus", "change the number of a domain's vCPUs", domain(), argument("count", "how many", kind=NUMBER),
      flag("maximum", "the most there can be; the same, for all of them are always there"), *SCOPE,
      failure="Failed to change the vCPUs of domain '{domain}'", exclusive=NOT_BOTH)
def setvcpus(session, given):
    session.done(session.daemon.post(of(given.domain, "vcpus"), count=given.count, **scope(given)), "")


@verb("vcpucount", "how many vCPUs a domain has", domain(),
      flag("maximum", "the most there can be"), flag("active", "those that are there"),
      flag("live", "of the running domain"), flag("config", "in its file"),
      flag("current", "of the running domain if it runs, else in its file"),
      exclusive=(*NOT_BOTH, ("live", "config"), ("maximum", "active")))
def vcpucount(session, given):
    one = session.daemon.get(of(given.domain))
    if given.live and one["id"] is None:
        raise DomainNotRunning("Requested operation is not valid: domain is not running")
    counts = {}
    if (one["persistent"] or given.config) and not (given.live or (given.current and one["id"] is not None)):
        counts["config"] = config_of(session, given.domain, inactive=True)["vcpus"]
    if one["id"] is not None and not given.config:
        counts["live"] = one["vcpus"]
    if given.maximum or given.active or given.live or given.config or given.current:
        text = "".join(f"{count}\n" for count in list(counts.values())[-1:])       # of the running domain, if there is one
    else:
        text = "".join(f"{what:<12} {where:<12} {count:>3}\n" for what in ("maximum", "current") for where, count in counts.items())
    session.answer(counts, text)


@verb("vcpuinfo", "where a domain's vCPUs run", domain(), flag("pretty", "the allowed CPUs as numbers"))
def vcpuinfo(session, given):
    vcpus = session.daemon.get(of(given.domain, "vcpus"))["vcpus"]
    session.answer({"vcpus": vcpus}, lambda: "\n".join(vcpu_text(vcpu, given.pretty) for vcpu in vcpus))


def vcpu_text(vcpu: dict, pretty: bool) -> str:
    running = vcpu["cpu"] is not None
    affinity = vcpu["affinity"]
    if pretty:
        affinity = f"{ranges([cpu for cpu, letter in enumerate(affinity) if letter == 'y'])} (out of {len(affinity)})"
    return render.pairs([("VCPU", vcpu["number"]), ("CPU", vcpu["cpu"] if running else "N/A"),
                         ("State", vcpu["state"] if running else "N/A"),
                         ("CPU time", render.seconds(vcpu["cpu_time_ns"]) if running else "N/A"),
                         ("CPU Affinity", affinity)], 16)
