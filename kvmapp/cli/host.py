"""The host and the daemon: nodeinfo, nodecpustats, nodememstats, capabilities, version, hostname, uri, reload."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import NUMBER, flag, value, verb
from kvmapp.cpuset import ranges
from kvmapp.errors import UsageError

STATISTICS = ("user", "system", "idle", "iowait")


@verb("nodeinfo", "the host's CPUs and memory")
def nodeinfo(session, given):
    node = session.daemon.get("/v1/node")
    session.answer(node, lambda: render.pairs([
        ("CPU model", node["model"]), ("CPU(s)", node["cpus"]), ("CPU frequency", f"{node['mhz']} MHz"),
        ("CPU socket(s)", node["sockets"]), ("Core(s) per socket", node["cores"]), ("Thread(s) per core", node["threads"]),
        ("NUMA cell(s)", node["numa_cells"]), ("Memory size", render.kib(node["memory"]))], 21))


@verb("nodecpustats", "the time of the host's CPUs, in nanoseconds since its boot",
      value("cpu", "of this CPU only", kind=NUMBER), flag("percent", "in parts of a hundred, of one second from now"))
def nodecpustats(session, given):
    times = cpu_times(session, given.cpu)
    if not given.percent:
        session.answer(times, lambda: "".join(f"{f'{name}:':<15} {times[f'{name}_ns']:>20}\n" for name in STATISTICS))
        return
    import time
    time.sleep(1)
    later = cpu_times(session, given.cpu)
    spent = {name: later[f"{name}_ns"] - times[f"{name}_ns"] for name in STATISTICS}
    whole = sum(spent.values()) or 1
    shares = {"usage": 100 - 100 * (spent["idle"] + spent["iowait"]) / whole, **{name: 100 * spent[name] / whole for name in STATISTICS}}
    session.answer({name: round(share, 1) for name, share in shares.items()},
                   lambda: "".join(f"{f'{name}:':<15} {share:>5.1f}%\n" for name, share in shares.items()))


def cpu_times(session, cpu: int | None) -> dict:
    found = session.daemon.get("/v1/node/cpustats", cpu=cpu)["cpus"]
    if not found:
        raise UsageError(f"This host has no CPU {cpu}")
    return found[0]


@verb("nodememstats", "the host's memory, in KiB")
def nodememstats(session, given):
    stats = session.daemon.get("/v1/node/memstats")
    session.answer(stats, lambda: "".join(f"{name:<7}:{stats[name] // render.KIB:>21} KiB\n"
                                          for name in ("total", "free", "buffers", "cached")))


@verb("capabilities", "what this host offers to guests", text="An INI text, where virsh has XML.")
def capabilities(session, given):
    found = session.daemon.get("/v1/capabilities")
    session.answer(found, lambda: capabilities_text(found))


def capabilities_text(found: dict) -> str:
    """Sections [host], [host cell N] and [guest]."""
    host, guest = found["host"], found["guest"]
    lines = ["[host]"]
    for key in ("uuid", "arch", "cpu", "vendor", "virtualization"):
        lines.append(f"{key} = {host[key] if host[key] is not None else 'none'}")
    lines += [f"{key} = {number}" for key, number in host["topology"].items()]
    lines += [f"pages = {', '.join(render.kib(size) for size in host['pages'])}", f"features = {', '.join(host['features'])}"]
    for cell in host["cells"]:
        lines += ["", f"[host cell {cell['id']}]", f"memory = {render.kib(cell['memory'])}", f"cpus = {ranges(cell['cpus'])}"]
    lines += ["", "[guest]"]
    for key, fact in guest.items():
        text = render.yes_no(fact) if isinstance(fact, bool) else ", ".join(fact) if isinstance(fact, list) else \
            render.kib(fact) if key == "max_memory" else render.or_dash(fact)
        lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"


@verb("version", "the versions of kvmapp and of what it stands on", flag("daemon", "the daemon's, too"))
def version(session, given):
    from kvmapp import __version__
    found = session.daemon.get("/v1/version")
    kernel = found["kernel"]
    lines = [f"Compiled against library: kvmapp {__version__}", f"Using library: kvmapp {__version__}",
             f"Using API: kvmapp {found['api']}", f"Running hypervisor: KVM {kernel}"]
    if given.daemon:
        lines.append(f"Running against daemon: {found['kvmapp']}")
    session.answer({"client": __version__, **found}, "\n".join(lines) + "\n")


@verb("hostname", "the host's name")
def hostname(session, given):
    name = session.daemon.get("/v1/node")["hostname"]
    session.answer({"hostname": name}, f"{name}\n")


@verb("uri", "the URI of the daemon that answers")
def uri(session, given):
    session.daemon.get("/v1/version")
    session.answer({"uri": session.uri}, f"{session.uri}\n")


@verb("reload", "have the daemon read every file of its configuration again", failure="Failed to reload the configuration")
def reload(session, given):
    reloaded = session.daemon.post("/v1/daemon/reload")
    broken = "".join(f"\nbroken: {name}" for name in reloaded["broken"])
    session.done(reloaded, f"Configuration read again: {reloaded['domains']} domains{broken}")
