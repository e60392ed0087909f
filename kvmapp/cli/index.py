"""Which verbs there are, by the groups that `help` shows, and which module of this folder has each: no other is imported for it.

A test holds this to what the modules say.
"""
from __future__ import annotations

from kvmapp.cli.table import VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.cli.table import Verb

# keyword of the group: its title, and module → verbs
GROUPS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "domain": ("Domain Management", {
        "lifecycle": ("autostart", "autostart-stop", "destroy", "reboot", "reset", "resume", "shutdown", "start", "suspend", "wait"),
        "definition": ("create", "define", "desc", "domrename", "dumpconf", "dumpxml", "undefine"),
        "editing": ("edit",),
        "saving": ("domjobabort", "managedsave", "managedsave-remove", "restore", "save"),
        "identity": ("domid", "domname", "domuuid"),
        "resources": ("setmaxmem", "setmem", "setvcpus", "vcpucount", "vcpuinfo"),
        "tuning": ("emulatorpin", "memtune", "numatune", "schedinfo", "vcpupin"),
        "console": ("console", "ttyconsole"),
        "cards": ("attach-interface", "detach-interface", "domif-getlink", "domif-setlink", "domiftune"),
        "disks": ("attach-disk", "blockresize", "detach-disk"),
    }),
    "monitor": ("Domain Monitoring", {
        "listing": ("list",),
        "disks": ("domblkerror", "domblkinfo", "domblkstat"),
        "monitor": ("domblklist", "domiflist", "dominfo", "domjobinfo", "domlog", "domstate"),
        "stats": ("dommemstat", "domstats"),
        "top": ("stats", "top"),
        "addresses": ("domifaddr", "domifstat"),
    }),
    "events": ("Domain Events", {
        "events": ("event",),
    }),
    "network": ("Networking", {
        "network": ("net-autostart", "net-define", "net-destroy", "net-dhcp-leases", "net-dumpconf", "net-dumpxml", "net-edit", "net-info",
                    "net-list", "net-name", "net-start", "net-undefine", "net-update", "net-uuid"),
    }),
    "interface": ("Host Interfaces", {
        "interfaces": ("iface-bridge", "iface-dumpconf", "iface-list", "iface-mac", "iface-name", "iface-unbridge"),
    }),
    "host": ("Host and Hypervisor", {
        "host": ("capabilities", "hostname", "nodecpustats", "nodeinfo", "nodememstats", "reload", "uri", "version"),
    }),
    "kvmappctl": ("kvmappctl itself", {
        "shell": ("cd", "connect", "echo", "exit", "pwd", "quit"),
        "help": ("help",),
    }),
}
GROUP_ALIASES = {"virsh": "kvmappctl"}
HIDDEN = {"complete": "complete"}           # for the shells' completion, not for people

MODULES = {name: module for _, modules in GROUPS.values() for module, names in modules.items() for name in names} | HIDDEN


def find(name: str) -> Verb | None:
    """The verb of this name; imports its module."""
    module = MODULES.get(name)
    if module is None:
        return None
    __import__(f"kvmapp.cli.{module}")
    return VERBS[name]
