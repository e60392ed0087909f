"""A domain process without a guest, for tests of the daemon: control.py's protocol, and a counter that never stops.

The zygote runs it in vmprocess's place (`--domain-module tests.unit.fake_domain`). The domain's description says how it behaves,
in words: `ignore-acpi`, `mute` (does not answer), `fail` (cannot start), `raise` (a defect), `slow-start`; `no-hotplug`, `keeps-cards`
(of cards); `small-host` (of disks); `old`, `old-tuning` (an older version's: it does not know those verbs).
Each running domain appends to a file of its own, RUN_DIR/counter, so that a test sees whether it goes on.
"""
import contextlib
import json
import os
import select
import selectors
import socket
import time

BEAT = 0.02


class FakeDomain:
    def __init__(self, config, control, run_dir, paused, files):
        self.config, self.control, self.run_dir = config, control, run_dir
        self.files, self.came = files, []
        self.links = {}
        self.slot = 7                   # the last one that is taken
        self.cards = [f"net{one.index}" for one in config.interfaces] + [one.name for one in config.disks]
        self.tuned = {}
        self.behaviour = set((config.description or "").split())
        self.state, self.reason = ("paused", "user") if paused else ("running", "booted")
        self.started = time.time()
        self.balloon = config.memory
        self.selector = selectors.DefaultSelector()
        self.clients = {}
        self.subscribers = set()
        self.ending = None
        self.beats = 0
        self.presses = 0
        self.clock = 0.0
        control.setblocking(False)
        self.selector.register(control, selectors.EVENT_READ)
        self.counter = os.open(os.path.join(run_dir, "counter"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def run(self):
        while self.ending is None:
            for key, _ in self.selector.select(BEAT):
                if key.fileobj is self.control:
                    self.accept()
                else:
                    self.receive(key.fileobj)
            if self.state == "running":
                self.beats += 1
                os.write(self.counter, f"{os.getpid()}\n".encode())
        for client in self.clients if "last-breath" in self.behaviour else ():
            client.close()
        time.sleep(0.2 if "last-breath" in self.behaviour else 0)
        return self.ending

    def accept(self):
        client, _ = self.control.accept()
        client.setblocking(False)
        self.clients[client] = b""
        self.selector.register(client, selectors.EVENT_READ)

    def receive(self, client):
        try:
            data, fds, _, _ = socket.recv_fds(client, 65536, 8)
            self.came += fds
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(client)
            self.subscribers.discard(client)
            del self.clients[client]
            client.close()
            return
        *lines, self.clients[client] = (self.clients[client] + data).split(b"\n")
        for line in lines:
            self.answer(client, json.loads(line))

    def answer(self, client, request):
        verb = getattr(self, f"verb_{request['verb'].replace('-', '_')}", None)
        if "old" in self.behaviour and request["verb"].endswith(("-device", "-disk")):
            verb = None
            while self.came:
                os.close(self.came.pop())
        try:
            reply = {"ok": verb(client, request)} if verb else {"error": error("bad-request", f"unknown verb {request['verb']}")}
        except Refusal as refusal:
            reply = {"error": refusal.args[0]}
        self.send(client, {"id": request["id"], **reply})

    def send(self, client, message):
        try:
            client.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def change(self, state, reason):
        self.state, self.reason = state, reason
        for client in list(self.subscribers):
            self.send(client, {"event": {"type": "lifecycle", "name": self.config.name, "state": state, "reason": reason,
                                         "time": time.time()}})

    def end(self, reason, text, exit=0):
        self.ending = {"state": "shut off", "reason": reason, "text": text, "hint": None, "exit": exit,
                       "time": time.time() + self.clock}

    def verb_status(self, _client, _request):
        return {"name": self.config.name, "uuid": self.config.uuid, "pid": os.getpid(), "state": self.state, "reason": self.reason,
                "started": self.started, "vcpus": self.config.vcpus, "memory": self.config.memory, "balloon": self.balloon,
                "devices": [{"name": name, "slot": slot} for slot, name in enumerate(self.cards, 3)]}

    def verb_stats(self, _client, _request):
        exits = {"io": self.beats, "hlt": 3, "power": self.presses}
        disks = {disk.name: {"read": {"requests": 1, "bytes": 512}} for disk in self.config.disks}
        cards = {f"net{one.index}": {"rx_bytes": 10, "tx_bytes": 20} for one in self.config.interfaces}
        return {"time": time.time(), "state": self.state, "balloon": self.balloon, "devices": {**disks, **cards},
                "vcpus": [{"index": 0, "exits": exits, "time": 5}]}

    def verb_subscribe(self, client, _request):
        self.subscribers.add(client)
        return {}

    def verb_shutdown(self, _client, _request):
        if not self.config.acpi:
            raise Refusal(error("wrong-state", "no ACPI", "acpi = yes"))
        self.presses += 1
        if "ignore-acpi" not in self.behaviour:
            self.end("shutdown", "the guest powered off")
        return {}

    def verb_destroy(self, _client, _request):
        self.end("destroyed", "destroyed", 5)
        return {}

    def verb_save_end(self, _client, _request):
        self.end("saved", "saved")
        return {}

    def verb_suspend(self, _client, _request):
        self.change("paused", "user")
        return {}

    def verb_resume(self, _client, _request):
        self.change("running", "unpaused")
        if "last-breath" in self.behaviour:
            self.end("shutdown", "the guest powered off")
        return {}

    def verb_reset(self, _client, _request):
        self.change("running", "booted")
        return {}

    def verb_reboot(self, client, request):
        return {} if "ignore-acpi" in self.behaviour else self.verb_reset(client, request)

    def verb_setmem(self, _client, request):
        self.balloon = request["bytes"]
        return {"balloon": self.balloon}

    def verb_tune(self, _client, request):
        if "old-tuning" in self.behaviour:
            raise Refusal(error("bad-request", "unknown verb 'tune'"))
        self.tuned = request["settings"]
        return {}

    def verb_test_tuned(self, _client, _request):
        return self.tuned

    # Cards and disks, as vmdevices.py has them.

    def verb_link(self, _client, request):
        self.links[request["device"]] = request["up"]
        return request

    def verb_attach_device(self, client, request):
        came, self.came = self.came, []
        if "no-hotplug" in self.behaviour:
            for fd in came:
                os.close(fd)
            raise Refusal(error("wrong-state", "no slot is free"))
        self.files |= dict(zip(request["files"], came, strict=True))
        section = request.get("disk") or request["interface"]
        if "knows-no-slot" in self.behaviour and "slot" in section:
            raise Refusal(error("config", f"slot = '{section['slot']}': unknown key"))
        name = section.get("name") or f"net{section['index']}"
        self.hold("before")
        if select.select([client], [], [], 0)[0]:               # whoever asked has hung up
            raise Refusal(error("bad-request", "nobody waits for this device any more"))
        self.cards.append(name)
        self.hold("after")
        self.slot += 1
        return {"device": name, "slot": section.get("slot", self.slot)}

    def hold(self, when):
        """With the behaviour attach-held-WHEN: until there is a file 'go'."""
        if f"attach-held-{when}" in self.behaviour:
            open(os.path.join(self.run_dir, "held"), "w").close()
            while not os.path.exists(os.path.join(self.run_dir, "go")):
                time.sleep(0.01)

    def verb_detach_device(self, _client, request):
        name = request["device"]
        if "keeps-cards" not in self.behaviour:
            self.cards.remove(name)
            for file in f"interface:{name.removeprefix('net')}", f"disk:{name}":
                if fd := self.files.pop(file, None):
                    os.close(fd)
            for client in list(self.subscribers):
                self.send(client, {"event": {"type": "device-removed", "name": self.config.name, "device": request["device"]}})
        return {"device": request["device"]}

    verb_attach_disk, verb_detach_disk = verb_attach_device, verb_detach_device

    def verb_resize_disk(self, _client, request):
        """It has no disks, and keeps what was asked."""
        if "small-host" in self.behaviour:
            raise Refusal(error("host", "File too large"))
        with open(os.path.join(self.run_dir, "resized"), "w") as file:
            json.dump(request, file)
        return {"device": request["device"], "bytes": request["bytes"]}

    # What only tests say, on a connection of their own.

    def verb_test_links(self, _client, _request):
        return self.links

    def verb_test_crash(self, _client, _request):
        self.end("crashed", "the guest crashed", 4)
        return {}

    def verb_test_clock(self, _client, request):
        self.clock = request["jump"]
        return {}

    def verb_test_frames(self, _client, request):
        """What a guest would send by its card; before each frame stands an empty virtio_net_hdr."""
        for frame in request["frames"]:
            os.write(self.files[f"interface:{request['card']}"], bytes(10) + bytes.fromhex(frame))
        return {}

    def verb_test_watchdog(self, _client, request):
        for subscriber in list(self.subscribers):
            self.send(subscriber, {"event": {"type": "watchdog", "name": self.config.name, "action": request["action"]}})
        return {}

    def verb_test_mute(self, _client, request):
        time.sleep(request["seconds"])
        return {}

    def verb_test_abort(self, _client, _request):
        os.abort()

    def verb_test_garbage(self, _client, request):
        for subscriber in self.subscribers:
            subscriber.sendall(request["text"].encode())
        return {}

    def verb_test_identity(self, _client, _request):
        with open("/proc/self/status") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status)
        return {"uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "sid": os.getsid(0), "ppid": os.getppid(),
                "capabilities": fields["CapEff"], "bounding": fields["CapBnd"], "no_new_privs": fields["NoNewPrivs"],
                "fds": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                              if os.path.lexists(f"/proc/self/fd/{fd}"))}


def preload():
    """It imports nothing later."""


class Refusal(Exception):
    pass


def error(code, message, hint=None):
    return {"code": code, "message": message, "hint": hint}


def run_domain(config, *, control: socket.socket, log_fd: int, files: dict, run_dir: str, drop=None, paused=False, cache=None):
    behaviour = set((config.description or "").split())
    with contextlib.suppress(OSError):                  # a full disk
        os.write(log_fd, f"fake domain, files {sorted(files)}\n".encode())
    if "raise" in behaviour:
        raise RuntimeError("a defect, made for the test")
    if "slow-start" in behaviour:
        time.sleep(1.0)
    if drop:
        drop()
    if "fail" in behaviour:
        ending = {"state": "shut off", "reason": "failed", "text": "Cannot open kernel: it is made of cheese",
                  "hint": "take another", "exit": 1, "time": time.time()}
    else:
        domain = FakeDomain(config, control, run_dir, paused, files)
        while "mute" in behaviour:
            time.sleep(3600)
        ending = domain.run()
    path = os.path.join(run_dir, f"{config.name}.end")
    with open(f"{path}.new", "w") as file:
        json.dump(ending, file)
    os.rename(f"{path}.new", path)
    return ending["exit"]
