"""Who else filters a network's packets: in the kernel one passes only if every table lets it.

    chains()                iptables' own: whether they are closed, and whether we stand in them
    marks()                 the same as text, which changes when somebody closes, opens or flushes one
    complaints(bridge)      what an administrator has to say to firewalld

For hosts with nft. Docker and ufw make the policy of iptables' chains DROP, and distributions end them with a rule that rejects; our
own chains are called first from those, as where there is no nft (netrules.py). In an open chain we have no business.
"""
from __future__ import annotations

import re

from kvmapp.daemon.hostnet import find_program, run
from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = {4: ("iptables", "ip", "/proc/net/ip_tables_names"), 6: ("ip6tables", "ip6", "/proc/net/ip6_tables_names")}
BASES = {"forward": "FORWARD", "input": "INPUT"}
# A policy, or a rule for whatever came that far: as nft shows them, and as iptables -S does.
CLOSED = re.compile(r"policy drop|^\s*(counter packets \d+ bytes \d+ )?(reject|drop)\b"
                    r"|^-P \w+ DROP|^-A \w+ -j (REJECT|DROP)\b", re.MULTILINE)


class Chain:
    """One of iptables' own, `text` as its keeper shows it; empty where there is none."""

    def __init__(self, version: int, name: str):
        self.version, self.name, self.base = version, name, BASES[name]
        self.tool, self.family, names = TOOLS[version]
        self.text = said(["nft", "list", "chain", self.family, "filter", self.base])
        if not self.text and "filter" in content(names).split():        # of the older kind; asked without need, it would be made
            self.text = said([self.tool, "-S", self.base])

    @property
    def is_closed(self) -> bool:
        return CLOSED.search(self.text) is not None

    @property
    def has_ours(self) -> bool:
        return f"KVMAPP-{self.base}" in self.text


def chains() -> Iterator[Chain]:
    for version, (tool, _, _) in TOOLS.items():
        if find_program(tool):
            yield from (Chain(version, name) for name in BASES)


def marks() -> str:
    return "".join(f"# {chain.family} {chain.base}: closed={chain.is_closed} ours={chain.has_ours}\n" for chain in chains()
                   if chain.is_closed or chain.has_ours)


def complaints(bridge: str) -> list[str]:
    """firewalld rejects DHCP, DNS and what is forwarded on a bridge that is in none of its zones."""
    if "table inet firewalld" not in said(["nft", "list", "tables"]) or not find_program("firewall-cmd"):
        return []
    if said(["firewall-cmd", f"--get-zone-of-interface={bridge}"]).strip():
        return []
    return [f"firewalld does not know bridge {bridge}, and keeps its guests from DHCP, DNS and the outside: firewall-cmd --permanent "
            f"--zone=trusted --add-interface={bridge}; firewall-cmd --reload"]


def said(words: list[str]) -> str:
    """Empty where there is nothing of the kind."""
    try:
        return run(words, "look at the host's firewalls")
    except HostError:
        return ""


def content(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
