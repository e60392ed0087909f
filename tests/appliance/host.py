"""A plain host with a disk of its own, for the appliance's tests: it is booted, told commands, rebooted, and cut from its power."""
import re
import shutil
import tempfile
import time
from dataclasses import dataclass

from tests.lab import images
from tests.lab.commandline import CHECKOUT, overlay, site_packages
from tests.lab.errors import NestedHostDied, TimeIsUp
from tests.lab.nested import BOOT_TIMEOUT, Hardware, NestedHost, Share, new_folder

PATIENCE = 300.0            # upper bounds, for a nested host on a busy machine
BOOTS = 3                   # tries


@dataclass
class Said:
    """What a command wrote and how it ended."""

    status: int
    out: str
    err: str


class PlainHost:
    lost = False                                                # one of them died without being told to

    def __init__(self, init="sysvinit"):
        self.folder = new_folder()
        self.init = init
        self.kernel = ""                                        # which Linux it boots: Debian's own, or another release
        self.disk = overlay(self.folder / "disk.qcow2", images.obtain(init=init))
        self.nested: NestedHost | None = None
        self.words: list[str] = []                              # everything that was said, for the report of a failure

    def boot(self) -> None:
        """The emulated host itself hangs or panics now and then: it is booted again then, as after a power cut, and this is said."""
        out = self.folder / "shared"
        out.mkdir(exist_ok=True)
        found = images.obtain(other_kernel=self.kernel, init=self.init)
        for left in reversed(range(BOOTS)):
            self.nested = NestedHost(self.folder, out)
            self.nested.start(found, Hardware(disk=self.disk, init=True), Share(CHECKOUT, site_packages(), out))
            try:
                self.nested.run(["true"], BOOT_TIMEOUT)
                return
            except (TimeIsUp, NestedHostDied) as error:
                self.nested.kill()
                if not left:
                    raise
                print(f"\nlab: {error}: booted again; the console's end:\n{self.console()[-1500:]}", flush=True)

    def run(self, command: str, seconds: float = PATIENCE) -> Said:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                status = self.nested.run([f"cd /root\n{command}"], seconds, (out.fileno(), err.fileno()))
            except (NestedHostDied, OSError):
                PlainHost.lost = True
                raise
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode().replace("\r\n", "\n"))
        said = Said(status, *texts)
        self.words += [f"# {command}", said.out + said.err]
        return said

    def says(self, command: str) -> str:
        """What a command prints that is to succeed without a complaint; without the empty line that ends virsh's words."""
        said = self.run(command)
        assert (said.status, said.err) == (0, ""), self.story()
        return re.sub(r"\n\n\Z", "\n", said.out)

    def refuses(self, command: str, status: int = 1) -> str:
        said = self.run(command)
        assert said.status == status, self.story()
        return said.err

    def eventually(self, command: str, pattern: str) -> re.Match[str]:
        """Waits for what no event tells: until the command's output matches."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.run(command).out, re.MULTILINE)):
            assert time.monotonic() < deadline, self.story()
        return found

    def reboot(self) -> str:
        """In order, by its init; what its console showed of going down."""
        before = len(self.console())
        try:
            self.nested.run(["reboot; sleep 1000"], PATIENCE)
        except NestedHostDied:                                  # QEMU ends where a machine would begin again
            pass
        shown = self.console()[before:]
        self.boot()
        return shown

    def cut_power(self) -> None:
        self.nested.kill()
        self.boot()

    def console(self) -> str:
        return (self.folder / "console.log").read_text(errors="replace").replace("\r\n", "\n")

    def story(self) -> str:
        return "\n".join(["the host's session:", *self.words[-24:], "end of its console:", self.console()[-1500:]])

    def close(self) -> None:
        if self.nested:
            self.nested.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
