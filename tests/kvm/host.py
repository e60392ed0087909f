"""A host whose domains are true guests: the daemon of tests/unit/daemon/host.py, and the probe guest (kvmapp/probe) beside it."""
import re
import shutil
from pathlib import Path

import pytest

from kvmapp.probe import IMAGE
from tests.unit.daemon.host import IS_ROOT, Host

needs_root = pytest.mark.skipif(not IS_ROOT, reason="domain processes change their user: needs root")


class KvmHost(Host):
    def __init__(self, root):
        super().__init__(root)
        self.options = ["--domain-module", "kvmapp.vmprocess"]
        shutil.copy(IMAGE, root)

    def guest(self, name, cmdline, top="", rest=""):
        """A domain with the probe guest; what it prints is added to NAME.out."""
        self.file(name).write_text(f"name = {name}\nmemory = 32 MiB\n{top}[boot]\nkernel = {self.root}/probe.elf\n"
                                   f"cmdline = {cmdline}\n[serial 0]\nlog = {self.root}/{name}.out\n{rest}")

    def counts(self, name):
        """Only of whole lines: one may be half written."""
        return [int(number) for number in re.findall(r"^count (\d+)\r?\n", self.printed(name), re.MULTILINE)]

    def printed(self, name):
        path = Path(self.root, f"{name}.out")
        return path.read_text() if path.exists() else ""
