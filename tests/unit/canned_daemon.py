"""A daemon for tests of the command line: answers that were put into it, over a real UNIX socket, held to the API's shapes.

    with CannedDaemon(tmp_path) as daemon:
        daemon.add(domain("linuxvm01", id=1))
        daemon.answers["POST", "/v1/domains/linuxvm01/start"] = JobRunning(...)
        ... daemon.requests[-1] == ("POST", "/v1/domains/linuxvm01/start", {})
"""
import json
import socketserver
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from kvmapp.daemon import shapes
from kvmapp.daemon.routes import ROUTES, STATUS
from kvmapp.errors import DomainNotFound, KvmappError

UUID = "004b96e1-2d78-c30f-5aa5-f03c87d21e6"


def domain(name: str, id: int | None = None, **more) -> dict:
    """Everything that GET /v1/domains/NAME tells of a domain."""
    running = id is not None
    number = int(name[-1]) if name[-1].isdigit() else 0
    return {
        "name": name, "uuid": f"{UUID}{number}", "id": id, "state": "running" if running else "shut off",
        "reason": "booted" if running else "unknown", "text": None, "since": None, "persistent": True, "autostart": False,
        "title": None, "vcpus": 2, "memory": 8 << 30, "current_memory": 8 << 30, "pid": 4000 + id if running else None,
        "started": 1.0 if running else None, "job": None, "waiting": None, "file": f"/etc/kvmapp/domains/{name}.conf",
        "outdated": False, "warnings": [],
        "os_type": "hvm", "managed_save": False, "cpu_time_ns": 251_700_000_000 if running else None, "resident": None,
        "log": f"/var/log/kvmapp/{name}.log", "control": f"/run/kvmapp/domains/{name}/control.sock" if running else None,
        "disks": [{"name": "vda", "source": f"/data/x{number}.img", "format": "raw", "bus": "virtio", "readonly": False,
                   "type": "file", "error": None}],
        "interfaces": [{"index": 0, "type": "bridge", "source": "br0", "model": "virtio", "mac": f"aa:bb:cc:dd:ee:0{number}",
                        "target": "vnet0" if running else None}],
        "consoles": [{"name": "serial0", "type": "pty", "path": None, "tty": "/dev/pts/7" if running else None}],
        "acpi": True, "balloon": True, "ending": None, "runtime": None, **more}


def stats(name: str, id: int | None = 1, **more) -> dict:
    return {"name": name, "id": id, "state": "running" if id else "shut off", "reason": "booted" if id else "unknown",
            "time": 100.0, "age": 0.0, "cpu_time_ns": 5_000_000, "cpu_user_ns": 3_000_000, "cpu_system_ns": 2_000_000,
            "vcpus": [{"number": 0, "state": "running", "cpu_time_ns": 4_000_000, "kvm": {"exits.sum": 9, "blocking.cur": 0}}],
            "exits": {"io": 7, "mmio": 2}, "disks": [], "interfaces": [], "balloon": None, **more}


def config_answer(text="name = linuxvm03\n", **config):
    return {"text": text, "file": "/etc/kvmapp/domains/linuxvm03.conf", "config": {"title": None, "description": None, **config},
            "digest": "d1"}


class CannedDaemon:
    def __init__(self, folder):
        self.path = str(folder / "kvmapp.sock")
        self.uri = f"kvmapp:///system?socket={self.path}"
        self.domains: dict[str, dict] = {}
        self.answers: dict[tuple[str, str], object] = {}    # a dict, an error, or a function of (query, body) that gives one
        self.requests: list[tuple] = []
        self.server = socketserver.ThreadingUnixStreamServer(self.path, type("Handler", (Handler,), {"daemon": self}))
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.server.handle_error = self.show_error          # type: ignore[method-assign]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def show_error(self, *_):
        """A client that went away is no defect; what a test put in wrongly is one."""
        if not isinstance(sys.exception(), ConnectionError):
            traceback.print_exc()

    def add(self, *found: dict) -> None:
        for one in found:
            self.domains[one["name"]] = one

    def find(self, reference: str) -> dict:
        for one in self.domains.values():
            if reference in (str(one["id"]), one["uuid"], one["name"]):
                return one
        raise DomainNotFound(f"failed to get domain '{reference}'")

    def answer(self, method: str, path: str, query: dict, body) -> dict:
        canned: Any = self.answers.get((method, path))
        if callable(canned):
            canned = canned(query, body)
        if isinstance(canned, Exception):
            raise canned
        if canned is not None:
            return canned
        if path == "/v1/domains" and method == "GET":
            listed = set(shapes.DOMAIN["properties"])
            return {"domains": [{key: value for key, value in one.items() if key in listed} for one in self.domains.values()]}
        words = path.split("/")
        one = self.find(unquote(words[3]))
        if method == "GET" and len(words) == 4:
            return one
        if method == "POST":
            return {"domain": one, "warnings": []}
        raise AssertionError(f"nothing canned for {method} {path}")


def answer_shape(method: str, path: str) -> dict:
    words = path.split("/")
    for route in ROUTES:
        parts = route.path.split("/")
        if route.method == method and len(parts) == len(words) and all(
                part == word or part.startswith("{") for part, word in zip(parts, words, strict=True)):
            return shapes.SCHEMAS[route.answer]
    raise AssertionError(f"the API has no {method} {path}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    daemon: CannedDaemon

    def address_string(self):
        return "local"

    def log_message(self, *_):
        pass

    def serve(self):
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null")
        self.daemon.requests.append((self.command, parts.path, *([query] if query else []), *([body] if body is not None else [])))
        shape = answer_shape(self.command, parts.path)
        try:
            answer, status = self.daemon.answer(self.command, parts.path, query, body), 200
        except KvmappError as error:
            answer, status = {"error": error.to_dict()}, STATUS.get(error.code, 500)
        if isinstance(answer, list):
            self.stream(answer)
            return
        wrong = None if status >= 400 else shapes.complaint(shape, answer)
        assert wrong is None, f"{self.command} {self.path}: {wrong}"
        self.send(status, json.dumps(answer).encode())

    def send(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, messages):
        """Lines of events; None stands for waiting until the client is gone."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for message in messages:
            if message is None:
                self.rfile.read(1)
                return
            data = json.dumps(message).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PUT = do_DELETE = serve  # noqa: N815
