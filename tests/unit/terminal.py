"""A program on a pseudo terminal, for tests: what it shows is awaited, what is typed is sent."""
import os
import pty
import select
import time
from pathlib import Path

from tests.waiting import until


class OnTerminal:
    """`with OnTerminal([program, ...], env) as screen: screen.expect("# "); screen.type("list\\r")`."""

    def __init__(self, words: list[str], environment: dict[str, str]):
        self.shown = ""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ.update(environment)
            os.execv(words[0], words)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.master)
        if self.pid:
            os.waitpid(self.pid, 0)

    def expect(self, text: str, within: float = 60) -> str:
        """Everything up to and with `text`, which is awaited."""
        end = time.monotonic() + within
        while text not in self.shown:
            if not select.select([self.master], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come: {self.shown!r}")
            try:
                data = os.read(self.master, 4096)
            except OSError:
                data = b""
            if not data:
                raise AssertionError(f"{text!r} did not come before the end: {self.shown!r}")
            self.shown += data.decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until_it_waits(self) -> None:
        """Returns when the program sleeps: for the next key, when it has shown what came of the last one."""
        until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S")

    def status(self) -> int:
        """Awaits the program's end."""
        while True:
            try:
                if not os.read(self.master, 4096):
                    break
            except OSError:
                break
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)
