"""What a domain is and does: dominfo, domstate, domjobinfo, domblklist, domiflist, domlog."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import NUMBER, domain, flag, value, verb
from kvmapp.client import of


@verb("dominfo", "basic information about a domain", domain(),
      text="Below the facts, `Messages` tell what holds the domain up: the job that has it, what autostart waits for, what is wrong "
           "with its file.")
def dominfo(session, given):
    detail = session.daemon.get(of(given.domain))
    session.answer(detail, lambda: render.pairs(dominfo_lines(detail), 16))


def dominfo_lines(detail: dict) -> list[tuple[str, object]]:
    cpu_time = detail["cpu_time_ns"]
    used = detail["current_memory"] if detail["current_memory"] is not None else detail["memory"]
    lines: list[tuple[str, object]] = [
        ("Id", render.or_dash(detail["id"])), ("Name", detail["name"]), ("UUID", render.or_dash(detail["uuid"])),
        ("OS Type", detail["os_type"]), ("State", detail["state"]), ("CPU(s)", render.or_dash(detail["vcpus"]))]
    if cpu_time:
        lines.append(("CPU time", render.seconds(cpu_time)))
    lines += [("Max memory", render.kib(detail["memory"])), ("Used memory", render.kib(used)),
              ("Persistent", render.yes_no(detail["persistent"])),
              ("Autostart", "enable" if detail["autostart"] else "disable"),
              ("Managed save", render.yes_no(detail["managed_save"]))]
    return lines + [("" if number else "Messages", text) for number, text in enumerate(messages(detail))]


def messages(detail: dict) -> list[str]:
    job, waiting = detail["job"], detail["waiting"]
    texts = [detail["text"]] if detail["text"] not in (None, detail["reason"]) else []
    if job:
        texts.append(job_text(job))
    if waiting:
        texts.append(f"waiting since {render.clock(waiting['since'])} for {', '.join(waiting['missing'])}")
    return texts + detail["warnings"]


def job_text(job: dict) -> str:
    progress = f" ({job['progress']})" if job["progress"] else ""
    return f"{job['verb']}{progress} by {job['who']}, since {render.clock(job['since'])}"


@verb("domstate", "the state of a domain", domain(), flag("reason", "how it came into this state, too"))
def domstate(session, given):
    one = session.daemon.get(of(given.domain))
    reason = f" ({one['reason']})" if given.reason else ""
    session.answer({key: one[key] for key in ("state", "reason", "text", "since")}, f"{one['state']}{reason}\n")


@verb("domjobinfo", "the job that holds a domain", domain(),
      text="One job a domain at a time changes it; queries never wait for it.")
def domjobinfo(session, given):
    job = session.daemon.get(of(given.domain))["job"]
    session.answer({"job": job}, lambda: render.pairs(job_lines(job), 18))


def job_lines(job: dict | None) -> list[tuple[str, object]]:
    if job is None:
        return [("Job type", "None")]
    return [("Job type", "Unbounded"), ("Operation", job["verb"]), ("Started by", job["who"]), ("Since", render.clock(job["since"])),
            ("Progress", render.or_dash(job["progress"]))]


INACTIVE = flag("inactive", "of a running domain: what its next start will take")


@verb("domblklist", "the disks of a domain", domain(), INACTIVE,
      flag("details", "the kind of source and of device, too"))
def domblklist(session, given):
    disks = parts(session, given, "disks")
    if given.details:
        titles = ["Type", "Device", "Target", "Source"]
        rows = [[one.get("type", "file"), "disk", one["name"], one["source"]] for one in disks]
    else:
        titles = ["Target", "Source"]
        rows = [[one["name"], one["source"]] for one in disks]
    session.answer({"disks": disks}, lambda: render.table(titles, rows, header=not session.quiet))


@verb("domiflist", "the network interfaces of a domain", domain(), INACTIVE)
def domiflist(session, given):
    interfaces = parts(session, given, "interfaces")
    rows = [[render.or_dash(one[key]) for key in ("target", "type", "source", "model", "mac")] for one in interfaces]
    session.answer({"interfaces": interfaces},
                   lambda: render.table(["Interface", "Type", "Source", "Model", "MAC"], rows, header=not session.quiet))


def parts(session, given, key: str) -> list[dict]:
    """The devices as they are now, or as the file has them."""
    if given.inactive:
        from kvmapp.cli.definition import config_of
        return config_of(session, given.domain, inactive=True)[key]
    return session.daemon.get(of(given.domain))[key]


@verb("domlog", "the end of a domain's log", domain(), value("lines", "how many (default 200)", kind=NUMBER))
def domlog(session, given):
    log = session.daemon.get(of(given.domain, "log"), lines=given.lines)
    session.answer(log, lambda: "".join(f"{render.plain(line)}\n" for line in log["lines"]))
