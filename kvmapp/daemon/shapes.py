"""The JSON that crosses the daemon's socket, as JSON Schema: what openapi.py publishes and the tests hold every answer to.

Sizes are bytes, times are seconds of the epoch, durations are seconds unless a name ends in `_ns`. A field that a shape
lists is always there; one that may have no value is null then. Left out: the settings of a domain file, which schema.py
has (`config` below is what DomainConfig.to_dict gives).
"""
from __future__ import annotations

Shape = dict


def text(help: str = "") -> Shape:
    return {"type": "string", "description": help} if help else {"type": "string"}


def whole(help: str = "") -> Shape:
    return {"type": "integer", "description": help} if help else {"type": "integer"}


def number(help: str = "") -> Shape:
    return {"type": "number", "description": help} if help else {"type": "number"}


def yes_no(help: str = "") -> Shape:
    return {"type": "boolean", "description": help} if help else {"type": "boolean"}


def one_of(*choices: str) -> Shape:
    return {"type": "string", "enum": list(choices)}


def maybe(shape: Shape) -> Shape:
    """The shape, or null."""
    if "$ref" in shape or "enum" in shape:
        return {"anyOf": [shape, {"type": "null"}]}
    return {**shape, "type": [shape["type"], "null"]}


def list_of(shape: Shape) -> Shape:
    return {"type": "array", "items": shape}


def map_of(shape: Shape) -> Shape:
    return {"type": "object", "additionalProperties": shape}


def record(**fields: Shape) -> Shape:
    return {"type": "object", "properties": fields, "required": list(fields)}


def options(**fields: Shape) -> Shape:
    """A request: every field may be left out, unknown ones are refused."""
    return {"type": "object", "properties": fields, "additionalProperties": False}


def ref(name: str) -> Shape:
    return {"$ref": f"#/components/schemas/{name}"}


STATES = ("running", "paused", "in shutdown", "shut off", "crashed", "no response", "broken")

ERROR = {**record(code=text("stable, one of errors.py"), message=text(), hint=maybe(text())),
         "description": "Some codes bring further facts: job-running has verb, who, since; config has file, line."}

JOB = record(verb=text("start, undefine, setmem, ..."), who=text("user and process that asked"), since=number(),
             progress=maybe(text("how far it is, in words")))

WAITING = record(since=number(), missing=list_of(text("for people: bridge br0, disk vda (/data/x.img), its turn")))

DOMAIN = record(
    name=text(), uuid=maybe(text("null for a broken file")),
    id=maybe(whole("given at start, kept while the domain runs")),
    state=one_of(*STATES),
    reason=text("in virsh's words: booted, unpaused, user, starting up, shutdown, destroyed, crashed, failed, unknown, ..."),
    text=maybe(text("more about the state, for people: why a file is broken, how a domain ended")),
    since=maybe(number("when it came into this state, if that is known")),
    persistent=yes_no(), autostart=yes_no(), title=maybe(text()),
    vcpus=maybe(whole()), memory=maybe(whole("what it has at most")), current_memory=maybe(whole("what the balloon leaves it")),
    pid=maybe(whole()), started=maybe(number()),
    job=maybe(ref("Job")),
    waiting=maybe(ref("Waiting")),
    file=maybe(text("its file, if it is persistent")),
    outdated=yes_no("whether it runs under another version of kvmapp than the daemon's"),
    warnings=list_of(text()))

DISK = record(name=text("vda"), source=text(), format=text(), bus=text(), readonly=yes_no(), type=one_of("file", "block"),
              error=maybe(text("no space: the guest is paused, for the host has no room for what it writes there")))

INTERFACE = record(index=whole(), type=text("bridge, network, user or tap"), source=maybe(text()), model=text(), mac=text(),
                   target=maybe(text("the tap: while it runs, vnetN")))

CONSOLE = record(name=text("serial0, console0: what console --devname takes"), type=text(),
                 path=maybe(text("of a file or socket")),
                 tty=maybe(text("the pseudo terminal, while it runs")))

ENDING = {**record(state=text(), reason=text(), text=text("for people"), time=number(), exit=maybe(whole())),
          "description": "How the domain ended the last time."}

DETAIL = {"allOf": [ref("Domain"), record(
    managed_save=yes_no("its next start goes on from there"),
    os_type=text("hvm"), cpu_time_ns=maybe(whole("user and system time of its process")),
    resident=maybe(whole("host memory that its process holds")),
    log=text("its log"), control=maybe(text("its control socket, for consoles")),
    disks=list_of(ref("Disk")), interfaces=list_of(ref("Interface")), consoles=list_of(ref("Console")),
    acpi=maybe(yes_no()), balloon=maybe(yes_no("whether it has one")),
    ending=maybe(ref("Ending")), runtime=maybe(text("the kvmapp version that it runs")))]}

DOMAINS = record(domains=list_of(ref("Domain")))

CHANGED = record(domain=ref("Domain"), warnings=list_of(text()))

INTERFACE_CHANGED = record(domain=ref("Domain"), interface=ref("Interface"), warnings=list_of(text()))

HOST_INTERFACES = record(interfaces=list_of(record(
    name=text(), mac=maybe(text()), active=yes_no("it is up"), mtu=maybe(whole()), type=text("ether, loopback, bridge, ..."),
    bridge=maybe(text("what it is a port of")), ports=list_of(text("of a bridge")), addresses=list_of(text("192.0.2.1/24")))))

BRIDGED = record(bridge=text(), device=text(), timeout=number("seconds until it is undone unless confirmed"), warnings=list_of(text()))

CONFIRMED = record(what=text("for people"))

SAVE_REMOVED = {"allOf": [ref("Changed"), record(removed=yes_no("false: there was none"))]}

DEFINED = record(domain=ref("Domain"), created=yes_no("false: there was one and it was replaced"),
                 made=list_of(text("what was absent and made: uuid, [interface 0] mac")), warnings=list_of(text()))

UNDEFINED = record(name=text(), removed=list_of(text("for people")), left=list_of(text("for people: disk vda (/data/x.img)")),
                   still_runs=yes_no("it goes on as a transient domain"))

CONFIG = record(text=text("the file's text, comments included; of a running domain's live configuration: made from it"),
                file=maybe(text()), config={"type": "object", "description": "DomainConfig.to_dict()"},
                digest=text("of the text: send it back with a changed text"))

MEMORY_SET = record(domain=ref("Domain"), balloon=maybe(whole("what the guest has now")), warnings=list_of(text()))

VCPU = record(number=whole(), state=text("running or offline"), cpu=maybe(whole("the host's CPU that it is on")),
              cpu_time_ns=whole(), affinity=text("y or - for each of the host's CPUs"))

VCPUS = record(vcpus=list_of(ref("Vcpu")))

CPUS = text("the host's CPUs: 0-1,3")
MICROSECONDS = whole("microseconds")
QUOTA = whole("microseconds in a period; -1: no limit")
TUNING = record(
    vcpus=list_of(record(number=whole(), cpus=CPUS)), emulator=CPUS, numa_mode=one_of("strict", "preferred", "interleave"),
    numa_nodeset=text("the host's NUMA nodes; empty: all of them"), cpu_shares=whole("1024 is usual"), vcpu_period=MICROSECONDS,
    vcpu_quota=QUOTA, global_period=MICROSECONDS, global_quota=QUOTA, hard_limit=maybe(whole("bytes; null: no limit")),
    soft_limit=maybe(whole()), swap_hard_limit=maybe(whole("of memory and swap together")))

DISK_STATS = record(name=text(), source=text(), rd_reqs=whole(), rd_bytes=whole(), rd_ns=whole(), wr_reqs=whole(),
                    wr_bytes=whole(), wr_ns=whole(), fl_reqs=whole(), fl_ns=whole(), errors=whole())

DISK_SIZES = record(disks=list_of(record(
    name=text(), source=text(), capacity=maybe(whole("what a guest sees that starts now; null: it cannot be looked at")),
    allocation=maybe(whole("what the host's file system has given for it")), physical=maybe(whole("the file's length")),
    error=maybe(text("why it cannot be looked at")))))

INTERFACE_STATS = record(index=whole(), target=maybe(text("the tap")), mac=text(), rx_bytes=whole(), rx_packets=whole(),
                         rx_drop=whole(), tx_bytes=whole(), tx_packets=whole(), tx_drop=whole())

BALLOON_STATS = record(
    current=whole("what the guest has"), maximum=whole(), rss=maybe(whole("what its process has in the host's memory")),
    swap_in=maybe(whole("the guest's own figures, from here on")), swap_out=maybe(whole()), major_fault=maybe(whole()),
    minor_fault=maybe(whole()), unused=maybe(whole("wholly free")), available=maybe(whole("what its kernel manages")),
    usable=maybe(whole("what programs could get")), last_update=maybe(whole("when the guest told them")), disk_caches=maybe(whole()),
    hugetlb_pgalloc=maybe(whole()), hugetlb_pgfail=maybe(whole()))

STATS = {**record(
    name=text(), id=maybe(whole()), state=text(), reason=text(), time=maybe(number("when the counters were taken")),
    age=maybe(number("how old they are: more than a moment when the domain does not answer")),
    cpu_time_ns=maybe(whole()), cpu_user_ns=maybe(whole()), cpu_system_ns=maybe(whole()),
    vcpus=list_of(record(number=whole(), state=text(), cpu_time_ns=whole(),
                         kvm=map_of(whole("by the kernel's names, ending in .sum, .cur or .max as virsh's; {} where it counts nothing")))),
    exits=map_of(whole("by the reasons of KVM_RUN, all vCPUs together")), disks=list_of(ref("DiskStats")),
    interfaces=list_of(ref("InterfaceStats")), balloon=maybe(ref("BalloonStats"))),
    "description": "Counters since the start of the domain; rx is what the guest received."}

ALL_STATS = record(domains=list_of(ref("Stats")))

WAITED = record(domain=ref("Domain"), reached=yes_no("false: the time ran out"))

EVENT = {**record(time=number(), event=one_of("lifecycle", "reboot", "balloon-change", "job", "autostart", "domain-broken",
                                              "network", "device-added", "device-removed", "io-error", "watchdog",
                                              "guest-ignored", "lost"),
                  domain=maybe(text()), uuid=maybe(text()), id=maybe(whole()),
                  type=maybe(text("lifecycle: Defined, Undefined, Started, Suspended, Resumed, Stopped, Shutdown, Crashed")),
                  detail=maybe(text("Added, Updated, Renamed, Removed, Booted, Paused, Unpaused, Shutdown, Destroyed, ..."))),
         "description": "One line of the stream. `lost`: the reader was too slow and the stream ends here. `guest-ignored`: a guest still "
                        "runs guest.conf's shutdown_timeout after its power button was pressed, by the verb in `type`. "
                        "`balloon-change`: detail has the guest's memory in bytes."}

NODE = record(model=text("x86_64"), cpus=whole(), mhz=whole(), sockets=whole(), cores=whole("per socket"),
              threads=whole("per core"), numa_cells=whole(), memory=whole(), hostname=text(), cpu_name=text())

CPU_STATS = record(cpus=list_of(record(number=maybe(whole("null: all of them")), user_ns=whole(), system_ns=whole(),
                                       idle_ns=whole(), iowait_ns=whole())))

MEMORY_STATS = record(total=whole(), free=whole(), buffers=whole(), cached=whole(), available=whole())

CAPABILITIES = record(
    host=record(uuid=maybe(text()), arch=text(), cpu=text("the CPU's name"), vendor=text(), features=list_of(text()),
                topology=record(sockets=whole(), cores=whole(), threads=whole()), pages=list_of(whole()),
                cells=list_of(record(id=whole(), memory=whole(), cpus=list_of(whole()))),
                virtualization=maybe(text("vmx, svm or null"))),
    guest=record(os_type=text(), arch=text(), kvm=yes_no("/dev/kvm is there"), max_vcpus=whole(), max_memory=whole(),
                 devices=list_of(text())))

VERSION = record(kvmapp=text(), api=whole("grows only when something that was there is taken away"), python=text(),
                 kernel=text())

DAEMON = record(pid=whole(), version=text(), started=number(), access=one_of("full", "read-only"), resident=whole(),
                zygote=maybe(whole("pid")), config_dir=text(), run_dir=text(), log_dir=text(), state_dir=text(),
                domains=record(defined=whole(), running=whole(), broken=whole()),
                jobs=list_of(record(domain=text(), job=ref("Job"))), autostart=ref("Autostart"), warnings=list_of(text()))

AUTOSTART = record(state=one_of("none", "running", "done"), started=list_of(text()), failed=map_of(text()),
                   waiting=map_of(ref("Waiting")))

AUTOSTART_STOPPED = record(left=list_of(text("a domain that it had still to start")))

RELOADED = record(domains=whole(), broken=list_of(text()), warnings=list_of(text()),
                  refused=list_of(text("of the warnings: a file of the daemon's own that it could not use; it goes on with what it had")))

LOG = record(file=text(), lines=list_of(text()))

NETWORK = record(
    name=text(), uuid=maybe(text("null for a broken file")), state=one_of("active", "inactive", "broken"),
    text=maybe(text("why the file is broken")), active=yes_no(), persistent=yes_no(), autostart=yes_no(),
    mode=maybe(text("nat, route, isolated, open or bridge")), bridge=maybe(text("while it is active, or as its file names it")),
    ipv4=maybe(text("the host's address and the size: 192.168.122.1/24")), ipv6=maybe(text()),
    since=maybe(number("when it was started")), dnsmasq=maybe(whole("the pid of what answers DHCP and DNS")),
    file=maybe(text()), warnings=list_of(text()))

NETWORKS = record(networks=list_of(ref("Network")))

NETWORK_CHANGED = record(network=ref("Network"), warnings=list_of(text()))

NETWORK_DEFINED = record(network=ref("Network"), created=yes_no(), made=list_of(text("what was absent and made")),
                         warnings=list_of(text()))

NETWORK_UNDEFINED = record(name=text(), still_active=yes_no("it goes on until it is destroyed"), warnings=list_of(text()))

LEASE = record(expires=maybe(number("null: never")), mac=maybe(text()), protocol=one_of("ipv4", "ipv6"), address=text(),
               prefix=whole(), hostname=maybe(text()), client=maybe(text("client ID or DUID")))

LEASES = record(leases=list_of(ref("Lease")))

ADDRESSES = record(addresses=list_of(record(interface=maybe(text("the tap")), mac=text(), protocol=one_of("ipv4", "ipv6"),
                                            address=text(), prefix=whole())))

SCHEMAS: dict[str, Shape] = {
    "Error": ERROR, "Job": JOB, "Waiting": WAITING, "Domain": DOMAIN, "Disk": DISK, "Interface": INTERFACE, "Console": CONSOLE,
    "Ending": ENDING, "DomainDetail": DETAIL, "Domains": DOMAINS, "Changed": CHANGED, "SaveRemoved": SAVE_REMOVED,
    "Defined": DEFINED, "Undefined": UNDEFINED,
    "Config": CONFIG, "InterfaceChanged": INTERFACE_CHANGED, "HostInterfaces": HOST_INTERFACES, "Bridged": BRIDGED, "Confirmed": CONFIRMED,
    "MemorySet": MEMORY_SET, "Vcpu": VCPU, "Vcpus": VCPUS, "Tuning": TUNING, "DiskStats": DISK_STATS, "DiskSizes": DISK_SIZES,
    "InterfaceStats": INTERFACE_STATS, "BalloonStats": BALLOON_STATS, "Stats": STATS, "AllStats": ALL_STATS,
    "Waited": WAITED, "Event": EVENT, "Node": NODE, "CpuStats": CPU_STATS, "MemoryStats": MEMORY_STATS,
    "Capabilities": CAPABILITIES, "Version": VERSION, "Daemon": DAEMON, "Autostart": AUTOSTART,
    "AutostartStopped": AUTOSTART_STOPPED, "Reloaded": RELOADED, "Log": LOG,
    "Network": NETWORK, "Networks": NETWORKS, "NetworkChanged": NETWORK_CHANGED, "NetworkDefined": NETWORK_DEFINED,
    "NetworkUndefined": NETWORK_UNDEFINED, "Lease": LEASE, "Leases": LEASES, "Addresses": ADDRESSES,
}

# What requests carry.
CONFIG_TEXT = options(text=text("an INI file"), file=text("where the text came from: relative paths belong to its folder"))
DEFINE = options(text=text("an INI file"), file=text("where the text came from: relative paths belong to its folder"),
                 config={"type": "object", "description": "instead of text: what DomainConfig.to_dict gives"},
                 transient=yes_no("start it now and forget it when it ends"), paused=yes_no("transient: do not let it run yet"),
                 replace=yes_no("false: refuse when there is one of this name (default true)"))
EDIT = options(text=text("the whole new file"), digest=text("of the text it was made from; another one there now is an error"))
DEFINE_NETWORK = options(text=text("an INI file"), file=text("where the text came from"))
UPDATE_NETWORK = options(command=one_of("add", "modify", "delete"), section=one_of("host", "forward"), name=text("the heading's word"),
                         settings=map_of(text("as in the file: key and value")), live=yes_no("the active network, at once"),
                         config=yes_no("the file; neither: both, as far as they are there"))
UNBRIDGE = options(timeout=number("seconds to confirm it in; 30 if not given"))
BRIDGE = options(bridge=text("its name"), timeout=number("seconds to confirm it in; 30 if not given"))
INTERFACE_SETTINGS = map_of(text("as in [interface N] of the file: key and value; an empty value is the default"))
ATTACH_INTERFACE = options(settings=INTERFACE_SETTINGS, live=yes_no(), config=yes_no(), persistent=yes_no("the file, and live if it runs"))
DETACH_INTERFACE = options(type=text("of this type only"), interface=text("its MAC address, or its tap"), live=yes_no(), config=yes_no(),
                           persistent=yes_no())
UPDATE_INTERFACE = options(interface=text("its MAC address, or its tap"), settings=INTERFACE_SETTINGS, live=yes_no(), config=yes_no())
START = options(paused=yes_no("made, but its vCPUs do not run yet"), force_boot=yes_no("give up its managed save, if there is one"))
SAVED_AS = yes_no("how it is to come back; absent: as it is now")
SAVE = options(file=text("absolute path on the daemon's host"), paused=SAVED_AS)
MANAGED_SAVE = options(paused=SAVED_AS)
RESTORE = options(file=text("absolute path on the daemon's host"), paused=yes_no("its vCPUs do not run yet; absent: as it was saved"),
                  trust=yes_no("believe its configuration, though it was not saved by this host's daemon"))
SHUTDOWN = options(mode=one_of("acpi"), timeout=number("wait so long for the end; null or 0: do not wait, and an event tells if "
                                                            "it does not come (guest-ignored)"))
REBOOT = options(mode=one_of("acpi"))
DESTROY = options(graceful=yes_no("never SIGKILL: fail if the process does not end by itself"))
AUTOSTART_SET = options(enabled=yes_no())
RENAME = options(name=text())
SET_MEMORY = options(bytes=whole(), live=yes_no(), config=yes_no(), maximum=yes_no("memory instead of current_memory"))
ATTACH_DISK = options(name=text("its target: vdb"), settings=map_of(text("as in [disk NAME] of the file: key and value")),
                      live=yes_no(), config=yes_no(), persistent=yes_no("the file, and live if it runs"))
DETACH_DISK = options(disk=text("its target, or its source"), live=yes_no(), config=yes_no(), persistent=yes_no())
RESIZE_DISK = options(disk=text("its target, or its source"), bytes=maybe(whole("null: what its file or device has by now")),
                      shrink=yes_no("though it has more now, and what is at its end is lost"))
SET_VCPUS = options(count=whole(), live=yes_no(), config=yes_no())
TUNE = options(settings=map_of(map_of(text("as in the file; an empty one is the default"))), live=yes_no(), config=yes_no())
DESCRIBE = options(title=maybe(text()), description=maybe(text()), live=yes_no(), config=yes_no())

TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
                                      "array": (list,), "object": (dict,), "null": (type(None),)}


def complaint(shape: Shape, value: object, where: str = "") -> str | None:
    """The first thing that is wrong with a value, in words; None when it has this shape."""
    if "$ref" in shape:
        shape = SCHEMAS[shape["$ref"].rpartition("/")[2]]
    if "anyOf" in shape:
        complaints = [complaint(one, value, where) for one in shape["anyOf"]]
        return complaints[0] if all(complaints) else None
    for part in shape.get("allOf", ()):
        if found := complaint(part, value, where):
            return found
    names = shape.get("type", ())
    names = (names,) if isinstance(names, str) else names
    if names and not any(type(value) in TYPES[name] for name in names):
        return f"{where or 'it'} is {value!r:.80}, not {' or '.join(names)}"
    if value is not None and "enum" in shape and value not in shape["enum"]:
        return f"{where or 'it'} is {value!r:.80}, not one of {', '.join(shape['enum'])}"
    return complaint_inside(shape, value, where)


def complaint_inside(shape: Shape, value: object, where: str) -> str | None:
    if isinstance(value, list) and "items" in shape:
        complaints = (complaint(shape["items"], one, f"{where}[{number}]") for number, one in enumerate(value))
        return next(filter(None, complaints), None)
    if not isinstance(value, dict):
        return None
    fields, others = shape.get("properties", {}), shape.get("additionalProperties", True)
    for name in shape.get("required", ()):
        if name not in value:
            return f"{where}.{name} is missing".lstrip(".")
    for name, one in value.items():
        if name in fields or isinstance(others, dict):
            if found := complaint(fields.get(name, others), one, f"{where}.{name}".lstrip(".")):
                return found
        elif not others:
            return f"{f'{where}.{name}'.lstrip('.')} is not known here (known: {', '.join(fields) or 'nothing'})"
    return None
