"""A host in a temporary folder: the real daemon, the real zygote, and fake domains (fake_domain.py) in the place of guests.

Every answer of the daemon is held to its shape in the API's description.
"""
import contextlib
import grp
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvmapp.client import Client, of
from kvmapp.daemon import shapes
from kvmapp.daemon.main import cgroup_name
from kvmapp.daemon.paths import Paths
from kvmapp.daemon.process import start_time_of
from kvmapp.daemon.routes import ROUTES
from kvmapp.errors import KvmappError

ROOT = Path(__file__).resolve().parents[3]
DAEMON = "import sys; from kvmapp.daemon.main import main; sys.exit(main(sys.argv[1:]))"
PATIENT_DAEMON = DAEMON.replace("kvmapp.daemon.main", "tests.unit.daemon.patient")
PATIENCE = 90.0                         # for machines that are ten times slower, and busy
SOCKET_GROUP = grp.getgrgid(0).gr_name
GUEST = f"user = nobody\ngroup = {grp.getgrgid(pwd.getpwnam('nobody').pw_gid).gr_name}\n"
IS_ROOT = os.geteuid() == 0
UUID = "00000000-0000-4000-8000-000000000001"         # whose file has one is not written to before it is changed
WEB = "# Ann's server\nname = web   # do not rename\nmemory = 64 MiB\n[serial 0]\n[balloon]\n"


class CheckedClient(Client):
    """Refuses what docs/openapi.json does not describe."""

    def request(self, method, path, body=None, *, timeout=None):
        answer = super().request(method, path, body, timeout=timeout)
        pattern = path.partition("?")[0]
        route = next(route for route in ROUTES
                     if route.method == method and re.fullmatch(re.sub(r"{\w+}", "[^/]+", route.path), pattern))
        if route.answer:
            assert shapes.complaint(shapes.SCHEMAS[route.answer], answer) is None
        return answer


class Host:
    def __init__(self, root):
        self.root = root
        self.paths = Paths(root)
        self.uri = f"kvmapp:///system?socket={self.paths.socket}"
        self.process = None
        self.options = []
        self.launcher = []              # what the daemon is started by
        self.patient = True             # it waits for domains longer than users would have it (patient.py)
        self.log = os.path.join(root, "daemon.stderr")
        os.chmod(root, 0o711)
        os.makedirs(self.paths.domains)
        self.write_settings()

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, *more):
        """One in a folder of its own, whose daemon is not started yet; nothing of it is left."""
        root = tempfile.mkdtemp(prefix="kvmapp-")
        one = cls(root, *more)
        try:
            yield one
        finally:
            one.clean_up()
            shutil.rmtree(root)

    def write_settings(self):
        self.write("kvmapp.conf", f"unix_sock_group = {SOCKET_GROUP}\n")
        self.write("guest.conf", GUEST)

    def write(self, name, text):
        (Path(self.paths.config) / name).write_text(text)

    def file(self, name):
        return Path(self.paths.domain_config(name))

    def add(self, name, *behaviour, rest="", **settings):
        """A domain's file, as an administrator would copy it there; `rest` are its sections."""
        lines = [f"{key} = {value}" for key, value in {"name": name, "memory": "64 MiB", **settings}.items()]
        lines += [f"description = {' '.join(behaviour)}"] if behaviour else []
        self.file(name).write_text("\n".join(lines) + "\n" + rest)
        old = time.time() - 60
        os.utime(self.file(name), (old, old))

    def define(self, text=WEB, **more):
        """As `kvmappctl define` would in Ann's folder."""
        with self.client() as client:
            return client.post("/v1/domains", text=text, file="/home/ann/web.conf", **more)

    def start(self, *options, **environment):
        """Returns when the daemon says that it is ready."""
        address = os.path.join(self.root, "notify")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, open(self.log, "ab") as log:
            manager.bind(address)
            manager.settimeout(PATIENCE)
            self.process = subprocess.Popen(
                [*self.launcher, sys.executable, "-c", PATIENT_DAEMON if self.patient else DAEMON, "--root", self.root,
                 "--domain-module", "tests.unit.fake_domain", *self.options, *options],
                cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "NOTIFY_SOCKET": address, **environment})
            said = manager.recv(4096).decode()
        assert said.startswith("READY=1\n"), said
        return self

    def kill(self):
        """As kill -9 or a power cut would."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0

    def client(self, read_only=False, **options):
        return CheckedClient(self.paths.read_only_socket if read_only else self.paths.socket, timeout=PATIENCE, **options)

    def get(self, *parts, **query):
        with self.client() as client:
            return client.get(of(*parts), **query)

    def post(self, *parts, **body):
        with self.client() as client:
            return client.post(of(*parts), **body)

    def start_at_once(self, names):
        """Each by a client of its own."""
        with ThreadPoolExecutor(len(names)) as clients:
            list(clients.map(lambda name: self.post(name, "start"), names))

    def states(self):
        with self.client() as client:
            return {domain["name"]: domain["state"] for domain in client.get("/v1/domains")["domains"]}

    def domain(self, name):
        return self.get(name)

    def told(self, name, verb, **arguments):
        """Asks a domain itself, past the daemon."""
        from kvmapp.client import ask_domain
        return ask_domain(self.paths.control(name), verb, timeout=PATIENCE, **arguments)

    def tell(self, name, verb, **arguments):
        """As `told`, without an answer."""
        from kvmapp.client import connect
        connection = connect(self.paths.control(name), PATIENCE)
        connection.sendall(json.dumps({"id": 1, "verb": verb, **arguments}).encode() + b"\n")
        return connection

    def beats(self, name):
        """The guest's beats, each the pid that made it; only of whole lines, for one may be half written."""
        return [int(line) for line in (Path(self.paths.domain_own(name)) / "counter").read_text().rpartition("\n")[0].splitlines()]

    def beats_on(self, name):
        """Waits for two more beats: the first may have been on its way."""
        seen = len(self.beats(name))
        self.eventually(lambda: len(self.beats(name)) >= seen + 2, f"two more beats of {name}")

    def pids(self):
        return [record["pid"] for record in self.records().values() if record["pid"]]

    def records(self):
        folder = Path(self.paths.records)
        found = {}
        for path in folder.glob("*.json") if folder.exists() else ():
            with contextlib.suppress(FileNotFoundError):        # it ended while we look
                found[path.stem] = json.loads(path.read_text())
        return found

    def eventually(self, condition, what="it"):
        """Waits for what no event tells."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.01)
        raise AssertionError(f"{what} did not come true; the daemon said:\n{Path(self.log).read_text()}")

    def wipe(self):
        """No domains, and the settings it began with."""
        for name, state in self.states().items():
            if state not in ("shut off", "broken"):
                with contextlib.suppress(KvmappError):
                    self.post(name, "destroy")
        for path in [*Path(self.paths.domains).glob("*.conf"), *Path(self.paths.autostart).iterdir(),
                     *Path(self.paths.log).iterdir()]:
            path.unlink()
        assert self.states() == {}
        self.write_settings()
        with self.client() as client:
            assert client.post("/v1/daemon/reload")["warnings"] == []

    def clean_up(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError, ValueError):
            pid = int(Path(self.paths.pid_file).read_text())
            if self.root in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if "kvmapp: " in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        for pid in self.pids():
            self.eventually(lambda pid=pid: not start_time_of(pid))
        base = cgroup_name(self.paths)
        for folder in [*Path("/sys/fs/cgroup").glob(f"{base}/domain-*"), *Path("/sys/fs/cgroup").glob(f"*/{base}/domain-*"),
                       *Path("/sys/fs/cgroup").glob(f"*/{base}"), *Path("/sys/fs/cgroup").glob(base)]:
            with contextlib.suppress(OSError):
                folder.rmdir()
