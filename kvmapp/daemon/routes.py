"""THE table of the daemon's API: method, path, what it does, who may, what goes in and what comes out.

server.py serves exactly these, openapi.py describes exactly these. `{domain}` is, as in virsh, an Id, a UUID or a name, in
this order; `{network}` is a UUID or a name. Errors come as {"error": {"code", "message", "hint"}} with the HTTP status that STATUS
gives for the code.
"""
from __future__ import annotations

from kvmapp.daemon import shapes

READ_ONLY, FULL = "read-only", "full"


class Route:
    """`access` READ_ONLY: changes nothing, and is served on the read-only socket too."""
    __slots__ = ("access", "answer", "help", "method", "name", "path", "query", "request", "status")

    def __init__(self, method: str, path: str, name: str, answer: str, help: str, *, access: str = "",
                 request: dict | None = None, query: dict[str, dict] | None = None, status: int = 200):
        self.method, self.path, self.name, self.answer, self.help = method, path, name, answer, help
        self.access = access or (READ_ONLY if method == "GET" else FULL)
        self.request, self.query, self.status = request, query or {}, status


ONE = "/v1/domains/{domain}"
NET = "/v1/networks/{network}"

ROUTES = (
    Route("GET", "/v1/version", "version", "Version", "Versions of kvmapp, its API, and what it stands on."),
    Route("GET", "/v1/openapi.json", "openapi", "", "This description."),
    Route("GET", "/v1/daemon", "daemon", "Daemon", "The daemon itself."),
    Route("POST", "/v1/daemon/reload", "reload", "Reloaded", "Read every file of the configuration again."),
    Route("GET", "/v1/autostart", "autostart_status", "Autostart", "What became of the domains marked by autostart."),
    Route("POST", "/v1/autostart/stop", "autostart_stop", "AutostartStopped", "Start no further one of them until the host's next boot."),
    Route("GET", "/v1/node", "node", "Node", "The host: nodeinfo."),
    Route("GET", "/v1/node/cpustats", "node_cpustats", "CpuStats", "Time of the host's CPUs since its boot.",
          query={"cpu": shapes.whole("this one only"), "all": shapes.yes_no("each one, after the sum")}),
    Route("GET", "/v1/node/memstats", "node_memstats", "MemoryStats", "The host's memory."),
    Route("GET", "/v1/capabilities", "capabilities", "Capabilities", "What this host offers to guests."),
    Route("GET", "/v1/stats", "all_stats", "AllStats", "Counters of every running domain.",
          query={"all": shapes.yes_no("those that are shut off, too")}),
    Route("GET", "/v1/events", "events", "Event", "A stream without end: one JSON object a line, as things happen.",
          query={"domain": shapes.text("of this one only"), "event": shapes.text("of this kind only")}),
    Route("GET", "/v1/domains", "domains", "Domains", "Every domain, by name: running, shut off and broken ones."),
    Route("POST", "/v1/domains", "define", "Defined", "Define a domain, or create a transient one.", request=shapes.DEFINE,
          status=201),
    Route("GET", ONE, "domain", "DomainDetail", "One domain: dominfo, domblklist, domiflist."),
    Route("DELETE", ONE, "undefine", "Undefined", "Remove the domain's file and its autostart link; disks stay unless asked.",
          query={"remove_all_storage": shapes.yes_no(), "storage": shapes.text("these disks: vda,vdb")}),
    Route("GET", ONE + "/config", "config", "Config", "Its configuration: dumpconf.",
          query={"inactive": shapes.yes_no("of a running domain: what its next start will take")}),
    Route("PUT", ONE + "/config", "edit", "Defined", "Replace its file, if that is still as it was: edit.", request=shapes.EDIT),
    Route("POST", ONE + "/start", "start", "Changed", "Start it.", request=shapes.START),
    Route("POST", ONE + "/shutdown", "shutdown", "Changed", "Press its power button.", request=shapes.SHUTDOWN),
    Route("POST", ONE + "/reboot", "reboot", "Changed", "Ask the guest to reboot.", request=shapes.REBOOT),
    Route("POST", ONE + "/reset", "reset", "Changed", "Press its reset button."),
    Route("POST", ONE + "/suspend", "suspend", "Changed", "Stop its vCPUs."),
    Route("POST", ONE + "/resume", "resume", "Changed", "Let its vCPUs run again."),
    Route("POST", ONE + "/destroy", "destroy", "Changed", "End it now, whatever it does and whichever job holds it.",
          request=shapes.DESTROY),
    Route("POST", ONE + "/save", "save", "Changed", "Save it to a file and end it.", request=shapes.SAVE),
    Route("POST", ONE + "/managedsave", "managed_save", "Changed", "Save it and end it; its next start goes on from there.",
          request=shapes.MANAGED_SAVE),
    Route("POST", ONE + "/managedsave-remove", "managed_save_remove", "SaveRemoved", "Give its managed save up."),
    Route("POST", ONE + "/job/abort", "abort_job", "Changed", "End the save that holds it; its guest goes on: domjobabort."),
    Route("POST", "/v1/restore", "restore", "Changed", "Go on with a domain from the file it was saved to.", request=shapes.RESTORE),
    Route("POST", ONE + "/autostart", "autostart", "Changed", "Mark it to be started with the host, or not.",
          request=shapes.AUTOSTART_SET),
    Route("POST", ONE + "/rename", "rename", "Changed", "Give it another name while it is shut off.", request=shapes.RENAME),
    Route("POST", ONE + "/memory", "set_memory", "MemorySet", "setmem and setmaxmem.", request=shapes.SET_MEMORY),
    Route("POST", ONE + "/vcpus", "set_vcpus", "Changed", "setvcpus.", request=shapes.SET_VCPUS),
    Route("POST", ONE + "/description", "describe", "Changed", "Title and description: desc.", request=shapes.DESCRIBE),
    Route("GET", ONE + "/vcpus", "vcpus", "Vcpus", "Where its vCPUs run: vcpuinfo."),
    Route("GET", ONE + "/tuning", "tuning", "Tuning", "Where it runs and what it may take of the host: vcpupin, emulatorpin, numatune, "
          "schedinfo, memtune.", query={"inactive": shapes.yes_no("of a running domain: what its next start will take")}),
    Route("POST", ONE + "/tuning", "tune", "Changed", "Change that, in its file or at once.", request=shapes.TUNE),
    Route("GET", ONE + "/stats", "stats", "Stats", "Its counters: domstats."),
    Route("GET", ONE + "/log", "log", "Log", "The end of its log.", access=FULL,
          query={"lines": shapes.whole("200 if not given")}),
    Route("GET", ONE + "/wait", "wait", "Waited", "Answer when the domain is in one of these states, or the time is out.",
          query={"state": shapes.text("comma separated; shut off if not given"),
                 "timeout": shapes.number("seconds; none: for ever")}),
    Route("GET", ONE + "/addresses", "addresses", "Addresses", "What its cards are reached by: domifaddr.",
          query={"source": shapes.one_of("lease", "arp")}),
    Route("POST", ONE + "/interfaces", "interface_attach", "InterfaceChanged", "Give it one more network card: attach-interface.",
          request=shapes.ATTACH_INTERFACE),
    Route("POST", ONE + "/interfaces/detach", "interface_detach", "InterfaceChanged", "Take a card out: detach-interface.",
          request=shapes.DETACH_INTERFACE),
    Route("POST", ONE + "/interfaces/update", "interface_update", "InterfaceChanged",
          "Change a card's cable, filter or rates: domif-setlink, domiftune.", request=shapes.UPDATE_INTERFACE),
    Route("GET", ONE + "/disks", "disk_sizes", "DiskSizes", "How large its disks are, to the guest and on the host: domblkinfo."),
    Route("POST", ONE + "/disks", "disk_attach", "Changed", "Give it one more disk: attach-disk.", request=shapes.ATTACH_DISK),
    Route("POST", ONE + "/disks/detach", "disk_detach", "Changed", "Take a disk out: detach-disk.", request=shapes.DETACH_DISK),
    Route("POST", ONE + "/disks/resize", "disk_resize", "Changed", "Give a running domain's disk another size: blockresize.",
          request=shapes.RESIZE_DISK),
    Route("GET", "/v1/interfaces", "interfaces", "HostInterfaces", "The host's own network devices: iface-list."),
    Route("POST", "/v1/interfaces/confirm", "interface_confirm", "Confirmed", "Keep the change that waits: iface-bridge --confirm."),
    Route("POST", "/v1/interfaces/undo", "interface_undo", "Confirmed", "Take it back at once: iface-bridge --undo."),
    Route("POST", "/v1/interfaces/{interface}/bridge", "interface_bridge", "Bridged",
          "Make a bridge with this device in it, which takes over its addresses and routes: iface-bridge.", request=shapes.BRIDGE),
    Route("POST", "/v1/interfaces/{interface}/unbridge", "interface_unbridge", "Bridged", "The way back, for a bridge: iface-unbridge.",
          request=shapes.UNBRIDGE),
    Route("GET", "/v1/networks", "networks", "Networks", "Every virtual network, by name: active, inactive and broken ones."),
    Route("POST", "/v1/networks", "network_define", "NetworkDefined", "Define a network.", request=shapes.DEFINE_NETWORK, status=201),
    Route("GET", NET, "network", "Network", "One network: net-info."),
    Route("DELETE", NET, "network_undefine", "NetworkUndefined", "Remove its file and its autostart link; it stays active if it is."),
    Route("GET", NET + "/config", "network_config", "Config", "Its configuration: net-dumpconf.",
          query={"inactive": shapes.yes_no("of an active network: what its next start will take")}),
    Route("PUT", NET + "/config", "network_edit", "NetworkDefined", "Replace its file, if that is still as it was: net-edit.",
          request=shapes.EDIT),
    Route("POST", NET + "/start", "network_start", "NetworkChanged", "Make its bridge, rules, DHCP and DNS."),
    Route("POST", NET + "/destroy", "network_destroy", "NetworkChanged", "Take them away."),
    Route("POST", NET + "/autostart", "network_autostart", "NetworkChanged", "Mark it to be started with the host, or not.",
          request=shapes.AUTOSTART_SET),
    Route("POST", NET + "/update", "network_update", "NetworkChanged", "Change hosts and forwards, live: net-update.",
          request=shapes.UPDATE_NETWORK),
    Route("GET", NET + "/leases", "network_leases", "Leases", "Addresses that are lent: net-dhcp-leases.",
          query={"mac": shapes.text("of this card only")}),
)

# HTTP statuses of error codes; a code that is not here is 500.
STATUS = {
    "usage": 400, "config": 400, "bad-request": 400,
    "permission-denied": 403,
    "domain-not-found": 404, "network-not-found": 404, "pool-not-found": 404, "volume-not-found": 404,
    "domain-not-running": 409, "domain-running": 409, "name-in-use": 409, "job-running": 409, "wrong-state": 409,
    "console-busy": 409, "changed-meanwhile": 409, "guest-ignored": 409, "network-inactive": 409,
    "network-active": 409,
    "unsupported": 501, "too-many-clients": 503, "no-response": 504,
}
