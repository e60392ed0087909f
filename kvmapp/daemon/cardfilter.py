"""filter = clean-traffic: what may come out of one tap, as a table `netdev kvmapp-TAP` of its own, nft(8).

The chain stands at the tap's ingress, before the bridge, VLANs and the host see a frame; it costs other ports nothing, and the
kernel takes its hook away with the tap. Checked are the sender's MAC and IP addresses in Ethernet, ARP, IPv4, IPv6 and neighbour
discovery, and the MAC for which it asks a DHCP server, from whatever address: a lease may have run out on the way. Dropped are answers
of DHCP servers, router advertisements, redirects, tagged frames, and every other protocol.

    nft_text(tap, mac, known, learns)     the table; `known` addresses are the guest's own, and the first that it uses if it `learns`

Left out: what comes in, and iptables: ebtables and arptables have no step that replaces all rules at once.
"""
from __future__ import annotations

from kvmapp.daemon.hostnet import exists, find_program, run
from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "kvmapp-"
# Senders that no guest is known by: this network, loopback, what a guest takes while DHCP does not answer, multicast and broadcast.
NOBODY = "{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }"
HINT = "it takes nftables, and a kernel whose nf_tables has the family netdev (Linux 4.2 or later); or write filter = none"


# What the kernel is told.

def apply(heading: str, tap: str, mac: str, known: Iterable[str], learns: bool, *, new: bool = False) -> None:
    """Replaces the tap's rules in one step; what it has learned stays, unless the tap is `new`: then a table that is there is of one
    which had its name. Raises HostError, and nothing is changed then.
    """
    what = f"filter {heading}'s tap '{tap}'"
    if not find_program("nft"):
        raise HostError(f"Cannot {what}: the program 'nft' is not installed", HINT)
    try:
        run(["nft", "-f", "-"], what, nft_text(tap, mac, known, learns, new=new))
    except HostError as error:
        raise HostError(error.message, HINT) from None


def remove(tap: str) -> None:
    if PREFIX + tap in tables():
        run(["nft", "delete", "table", "netdev", PREFIX + tap], f"remove the filter of tap '{tap}'")


def tables() -> set[str]:
    """Those of ours that are there."""
    if not find_program("nft"):
        return set()
    words = run(["nft", "list", "tables", "netdev"], "look at the filters of taps").split()
    return {word for word in words if word.startswith(PREFIX)}


def remove_stale() -> None:
    """Of taps that are gone."""
    for table in tables():
        if not exists(table.removeprefix(PREFIX)):
            remove(table.removeprefix(PREFIX))


# The table.

def nft_text(tap: str, mac: str, known: Iterable[str], learns: bool, *, new: bool) -> str:
    """One transaction: the first line makes the second one possible where there is no table yet. `flush` takes the rules and leaves
    the set, into which the guest may be putting its address just now.
    """
    addresses = sorted(known)
    four, six = [one for one in addresses if ":" not in one], [one for one in addresses if ":" in one]
    table = f"table netdev {PREFIX}{tap}"
    lines = [table, f"flush {table}" if learns and not new else f"delete {table}", f"{table} {{"]
    if learns:
        lines += ["set learned {", "type ipv4_addr; flags dynamic; size 1;", "}"]
    lines += chain("from_guest", f'type filter hook ingress device "{tap}" priority -500; policy drop;',
                   f"ether saddr != {mac} drop", "vlan id 0-4095 drop",
                   "ether type arp jump from_arp", "ether type ip jump from_ipv4", "ether type ip6 jump from_ipv6")
    lines += chain("from_arp", f"arp saddr ether != {mac} drop", "arp operation request arp saddr ip 0.0.0.0 accept",
                   *own4("arp saddr ip", four, learns))
    lines += chain("from_ipv4", *dhcp(mac), *own4("ip saddr", four, learns))
    lines += chain("from_ipv6", *from_ipv6(mac, six))
    lines += chain("neighbour", *(f"{target_is(one)} return" for one in six), f"@th,128,64 != {eui64(mac):#018x} drop")
    return "\n".join([*lines, "}"]) + "\n"


def chain(name: str, *rules: str) -> list[str]:
    return [f"chain {name} {{", *rules, "}"]


def dhcp(mac: str) -> list[str]:
    """RFC 2131: chaddr, 28 bytes into the message, is who gets or gives back the lease. In a fragment it could not be seen, and a
    comparison does not hold where a frame is too short for it: so it is accepted by it, not dropped.
    """
    return ["udp sport 67 drop", "ip frag-off & 0x3fff != 0 udp dport 67 drop",
            f"udp sport 68 udp dport 67 @th,288,48 0x{mac.replace(':', '')} accept", "udp dport 67 drop"]


def own4(sender: str, known: list[str], learns: bool) -> list[str]:
    """The set takes one address: what comes after the first one does not fit in, and is dropped."""
    found = [f"{sender} {{ {', '.join(known)} }} accept"] if known else []
    return found + ([f"{sender} {NOBODY} drop", f"add @learned {{ {sender} }} accept"] if learns else [])


def from_ipv6(mac: str, known: list[str]) -> list[str]:
    """RFC 4861: who answers for an address (136), or asks whether it is free (135 from ::), names it behind the header."""
    found = ["icmpv6 type { nd-router-advert, nd-redirect } drop", "udp sport 547 drop",
             "icmpv6 type nd-neighbor-advert jump neighbour",
             "ip6 saddr :: icmpv6 type nd-neighbor-solicit jump neighbour",
             "ip6 saddr :: icmpv6 type { nd-router-solicit, nd-neighbor-solicit, mld-listener-report, mld2-listener-report } accept",
             f"ip6 saddr & ::ffff:ffff:ffff:ffff == {interface_id(mac)} accept"]
    return found + ([f"ip6 saddr {{ {', '.join(known)} }} accept"] if known else [])


def target_is(address: str) -> str:
    from ipaddress import IPv6Address
    return f"@th,64,128 {int(IPv6Address(address)):#034x}"


def eui64(mac: str) -> int:
    """RFC 4291, appendix A: the lower half of an address that is made of a MAC address."""
    value = int(mac.replace(":", ""), 16) ^ 0x02 << 40
    return (value >> 24) << 40 | 0xFFFE << 24 | value & 0xFFFFFF


def interface_id(mac: str) -> str:
    from ipaddress import IPv6Address
    return str(IPv6Address(eui64(mac)))
