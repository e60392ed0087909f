"""top: what the running domains do, refreshed: CPU, memory, exits, disks and network of each a second; stats: the same, once.

On a terminal the table is redrawn in place, q ends it; in a pipe each turn is the table's plain text.
"""
from __future__ import annotations

import os
import time

from kvmapp.cli import render
from kvmapp.cli.table import NUMBER, SECONDS, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import UsageError

TITLES = ("Id", "Name", "State", "CPU%", "Memory", "Exits/s", "Rd B/s", "Wr B/s", "Rx B/s", "Tx B/s")
ORDERS = {"cpu": "cpu", "exits": "exits", "disk": "read", "net": "receive", "id": "id", "name": "name"}


class Usage:
    """One domain's counters, and what became of them since the turn before."""
    __slots__ = ("counters", "id", "memory", "name", "rates", "state", "time")

    def __init__(self, stats: dict, before: Usage | None):
        self.id, self.name, self.state = stats["id"], stats["name"], stats["state"]
        self.time = stats["time"]
        self.memory = (stats["balloon"] or {}).get("current")
        self.counters = {
            "cpu": stats["cpu_time_ns"] or 0, "exits": sum(stats["exits"].values()),
            "read": total(stats["disks"], "rd_bytes"), "write": total(stats["disks"], "wr_bytes"),
            "receive": total(stats["interfaces"], "rx_bytes"), "send": total(stats["interfaces"], "tx_bytes")}
        self.rates = dict.fromkeys(self.counters, 0.0)
        if before and self.time is not None and before.time is not None and self.time > before.time:
            for key, count in self.counters.items():
                self.rates[key] = max(0, count - before.counters[key]) / (self.time - before.time)

    def row(self) -> list[str]:
        rates = [render.human(self.rates[key]) for key in ("exits", "read", "write", "receive", "send")]
        return [str(self.id), self.name, self.state, f"{self.rates['cpu'] / 1e7:.1f}", render.kib(self.memory), *rates]

    def to_dict(self) -> dict:
        return {"id": self.id, "name": self.name, "state": self.state, "memory": self.memory,
                "cpu_percent": round(self.rates["cpu"] / 1e7, 2),
                **{f"{key}_per_second": round(rate, 1) for key, rate in self.rates.items() if key != "cpu"}}


def total(parts: list[dict], key: str) -> int:
    return sum(part.get(key) or 0 for part in parts)


@verb("top", "what the running domains do, second by second",
      value("delay", "seconds between two turns (default 2)", kind=SECONDS, short="d", named=True),
      value("iterations", "end after so many turns", kind=NUMBER, short="n", named=True),
      value("sort", "in this order (default cpu)", choices=tuple(ORDERS), named=True, short="s"),
      flag("batch", "plain text, as in a pipe", short="b"),
      text="The first turn shows rates since the start of the command. CPU% is of one host CPU: two busy vCPUs are 200. q ends it.")
def top(session, given):
    if given.iterations == 0:
        raise UsageError("--iterations is a number from 1")
    screen = Screen(session) if not (given.batch or session.json) and session.sink.isatty() and os.isatty(0) else Paper(session)
    before = measure(session, {})
    turns = 0
    with screen:
        wait = 1.0                      # the first rates come soon
        while given.iterations is None or turns < given.iterations:
            if screen.ends_within(wait):
                break
            usages = measure(session, before)
            screen.show(sorted(usages.values(), key=order(given.sort or "cpu")))
            before, wait, turns = usages, given.delay or 2, turns + 1
    return 0


@verb("stats", "what the running domains do, once: top's table",
      value("interval", "measured for so many seconds (default 1)", kind=SECONDS, named=True),
      value("domain", "these only", many=True, complete="active"),
      text="domstats has all counters, as they stand.")
def stats(session, given):
    wanted = {session.daemon.get(of(name))["name"] for name in given.domain}
    before = measure(session, {})
    paper = Paper(session)
    if not paper.ends_within(given.interval or 1.0):
        paper.show([usage for name, usage in sorted(measure(session, before).items()) if not wanted or name in wanted])


def measure(session, before: dict[str, Usage]) -> dict[str, Usage]:
    found = session.daemon.get("/v1/stats")["domains"]
    return {stats["name"]: Usage(stats, before.get(stats["name"])) for stats in found
            if stats["id"] is not None}         # else it ended while it was asked


def order(by: str):
    key = ORDERS[by]
    if key in ("id", "name"):
        return lambda usage: getattr(usage, key)
    return lambda usage: (-usage.rates[key], usage.id)


class Paper:
    """Turns one below the other."""

    def __init__(self, session):
        self.session = session
        self.first = True

    def __enter__(self):
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def ends_within(self, seconds: float) -> bool:
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            return True
        return False

    def show(self, usages: list[Usage]) -> None:
        session = self.session
        if session.json:
            session.say_json({"time": time.time(), "domains": [usage.to_dict() for usage in usages]})
        else:
            session.say(("" if self.first else "\n") + table(usages))
        self.first = False
        session.flush()


class Screen:
    """The terminal's other page, so that what stood there before comes back."""

    def __init__(self, session):
        self.session = session

    def __enter__(self):
        import termios

        from kvmapp.cli.console import end_as_by_interrupt
        end_as_by_interrupt()
        self.saved = termios.tcgetattr(0)
        keys = termios.tcgetattr(0)
        keys[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(0, termios.TCSADRAIN, keys)
        self.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_exception: object) -> None:
        import termios
        self.write("\x1b[?25h\x1b[?1049l")
        termios.tcsetattr(0, termios.TCSADRAIN, self.saved)

    def ends_within(self, seconds: float) -> bool:
        """Waits; True when somebody pressed q or Ctrl-C."""
        from select import select
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                if select([0], [], [], left)[0] and os.read(0, 100) in (b"q", b"Q", b""):
                    return True
        except KeyboardInterrupt:
            return True
        return False

    def show(self, usages: list[Usage]) -> None:
        size = os.get_terminal_size(1)
        columns, rows = size.columns or 80, size.lines or 24            # a terminal that was never told its size has none
        head = f"kvmappctl top - {time.strftime('%H:%M:%S')}, {len(usages)} running\n\n"
        lines = (head + table(usages)).splitlines()[:rows]
        self.write("\x1b[H" + "\r\n".join(f"{line[:columns]}\x1b[K" for line in lines) + "\x1b[J")

    def write(self, text: str) -> None:
        self.session.say(text)
        self.session.flush()


def table(usages: list[Usage]) -> str:
    return render.table(TITLES, [usage.row() for usage in usages])
