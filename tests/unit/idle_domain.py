"""A domain whose machine does nothing and counts what it is told."""
from typing import Any

from kvmapp.config import config_from_options
from kvmapp.devices import Power
from kvmapp.vmprocess import Domain


class Machine:
    debug_console = None

    def __init__(self):
        self.power, self.did, self.lets_go, self.ejected, self.full = Power(), [], [], [], []

    def __getattr__(self, name):
        return lambda *_: self.did.append(name)

    def crash_report(self):
        return []

    def full_disks(self):
        return self.full

    def take_ejected(self):
        return self.ejected

    def reset(self):
        self.did.append("reset")
        return self.lets_go


class Loop:
    def stop(self):
        pass

    def later(self, seconds, callback):
        pass


def domain(text, tmp_path):
    file = tmp_path / "x.conf"
    file.write_text(f"name = x\nmemory = 16 MiB\n{text}")
    lines: list[str] = []
    machine: Any = Machine()
    loop: Any = Loop()
    made: Any = Domain(config_from_options([("--kernel", "/vmlinuz")], str(file)), machine, loop, lines.append)
    made.state, made.lines = "running", lines
    made.published = []
    made.publish = made.published.append
    return made
