"""Where the daemon's files stand: /etc, /run, /var/log and /var/lib, or wherever the command line puts them."""
from __future__ import annotations

import os


class Paths:
    """`root` stands before every folder that is not named itself (image builds, tests)."""
    __slots__ = ("cache", "config", "log", "run", "state")

    def __init__(self, root: str = "/", *, config: str | None = None, run: str | None = None, log: str | None = None,
                 state: str | None = None):
        self.config = os.path.abspath(config or os.path.join(root, "etc/kvmapp"))
        self.run = os.path.abspath(run or os.path.join(root, "run/kvmapp"))
        self.log = os.path.abspath(log or os.path.join(root, "var/log/kvmapp"))
        self.state = os.path.abspath(state or os.path.join(root, "var/lib/kvmapp"))
        self.cache = os.path.abspath(os.path.join(root, "var/cache/kvmapp"))       # made when there is something to keep

    @property
    def domains(self) -> str:
        return os.path.join(self.config, "domains")

    @property
    def autostart(self) -> str:
        return os.path.join(self.domains, "autostart")

    @property
    def socket(self) -> str:
        return os.path.join(self.run, "kvmapp.sock")

    @property
    def read_only_socket(self) -> str:
        return os.path.join(self.run, "kvmapp-sock-ro")

    @property
    def quick_socket(self) -> str:
        return os.path.join(self.run, "kvmapp-sock-quick")

    @property
    def pid_file(self) -> str:
        return os.path.join(self.run, "kvmapp.pid")

    @property
    def records(self) -> str:
        """The daemon's own notes of running domains; no domain process can write here."""
        return os.path.join(self.run, "records")

    @property
    def daemon_log(self) -> str:
        """Beside the domains' logs, since any name may be a domain's."""
        return f"{self.log}-daemon.log"

    @property
    def networks(self) -> str:
        return os.path.join(self.config, "networks")

    @property
    def network_autostart(self) -> str:
        return os.path.join(self.networks, "autostart")

    @property
    def network_run(self) -> str:
        """Notes of networks that are active, and their dnsmasqs' files."""
        return os.path.join(self.run, "networks")

    @property
    def network_state(self) -> str:
        """Leases, which outlive a restart of the network and of the host."""
        return os.path.join(self.state, "networks")

    @property
    def saved(self) -> str:
        """Managed saves."""
        return os.path.join(self.state, "save")

    @property
    def vouched(self) -> str:
        """Digests of the configurations in states that this daemon had saved (vouching.py)."""
        return os.path.join(self.state, "vouched")

    def managed_save(self, name: str) -> str:
        return os.path.join(self.saved, f"{name}.save")

    def domain_config(self, name: str) -> str:
        return os.path.join(self.domains, f"{name}.conf")

    def domain_run(self, name: str) -> str:
        """A running domain's folder. It is root's, so that no guest can put a socket in the place of another's."""
        return os.path.join(self.run, "domains", name)

    def control(self, name: str) -> str:
        return os.path.join(self.domain_run(name), "control.sock")

    def domain_own(self, name: str) -> str:
        """Where the domain process itself may write."""
        return os.path.join(self.domain_run(name), "own")

    def ending(self, name: str) -> str:
        return os.path.join(self.domain_own(name), f"{name}.end")

    def domain_log(self, name: str) -> str:
        return os.path.join(self.log, f"{name}.log")

    def make_folders(self) -> None:
        """Raises OSError. The configuration is root's; the rest may be looked into."""
        for folder, mode in ((self.config, 0o755), (self.domains, 0o700), (self.autostart, 0o700), (self.networks, 0o700),
                             (self.network_autostart, 0o700), (self.run, 0o755), (self.network_run, 0o755),
                             (self.network_state, 0o755), (self.records, 0o700), (os.path.join(self.run, "domains"), 0o755),
                             (self.log, 0o755), (self.state, 0o755), (self.saved, 0o700), (self.vouched, 0o700)):
            if not os.path.isdir(folder):
                os.makedirs(folder, mode)
