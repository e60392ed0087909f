"""One tap's port of a bridge: VLAN, filter and rates, put there at the domain's start and put back when somebody took it away.

bridge(8). The steps block; cards.py calls them in threads, one at a time.
"""
from __future__ import annotations

import os

from kvmapp.daemon import cardfilter, shaping
from kvmapp.daemon.hostnet import add_port, ask, run
from kvmapp.daemon.taps import is_bridge
from kvmapp.errors import HostError
from kvmapp.values import WORD_CHARACTERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import InterfaceConfig


class Known:
    """The addresses that a filtered guest may use; `learns`: the first one that it uses, too; `follows`: they are what its network
    lends, and may be others at any moment.
    """
    __slots__ = ("addresses", "follows", "learns")

    def __init__(self, addresses: frozenset[str], learns: bool, *, follows: bool = False):
        self.addresses, self.learns, self.follows = addresses, learns, follows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and (self.addresses, self.learns, self.follows) == (other.addresses, other.learns, other.follows)

    __hash__ = None                                             # type: ignore[assignment]


def settle(card: InterfaceConfig, tap: str, bridge: str, known: Known) -> None:
    """A tap that was just made. Raises HostError."""
    wanted = [key for key, value in (("vlan", card.vlan), ("filter", card.filter != "none"), ("in_average", card.in_average),
                                     ("out_average", card.out_average)) if value]
    if wanted and not WORD_CHARACTERS.issuperset(tap):
        raise HostError(f"Cannot use tap '{tap}' for {card.heading} with {wanted[0]}: letters, digits, dots, dashes and underscores "
                        "make its name here", "leave target out, and it is vnetN")
    if card.vlan is not None:
        join_vlan(card, tap, bridge)
    if card.filter != "none":
        cardfilter.apply(card.heading, tap, card.mac, known.addresses, known.learns, new=True)
    if shaping.is_limited(card):
        shaping.apply(card, tap)


def join_vlan(card: InterfaceConfig, tap: str, bridge: str) -> None:
    """The only one of this port; frames leave and enter it without a tag."""
    what = want_vlans(card, bridge)
    for port in ask(["bridge", "vlan", "show", "dev", tap], what):
        for vlan in port.get("vlans", ()):
            if vlan["vlan"] != card.vlan:
                run(["bridge", "vlan", "del", "dev", tap, "vid", str(vlan["vlan"])], what)
    run(["bridge", "vlan", "add", "dev", tap, "vid", str(card.vlan), "pvid", "untagged"], what)


def want_vlans(card: InterfaceConfig, bridge: str) -> str:
    """What is to be done, in words. Raises HostError."""
    what = f"put {card.heading} into VLAN {card.vlan}"
    if not filters_vlans(bridge):
        raise HostError(f"Cannot {what}: bridge '{bridge}' does not filter VLANs", f"ip link set {bridge} type bridge vlan_filtering 1")
    return what


def filters_vlans(bridge: str) -> bool:
    try:
        with open(f"/sys/class/net/{bridge}/bridge/vlan_filtering") as switch:
            return switch.read().strip() == "1"
    except OSError:
        return False


def is_loose(tap: str, bridge: str) -> bool:
    """Its bridge is there but it is in none: the bridge was made anew. One that an administrator put elsewhere is left there."""
    return is_bridge(bridge) and os.path.exists(f"/sys/class/net/{tap}") and not os.path.exists(f"/sys/class/net/{tap}/master")


def put_back(card: InterfaceConfig, tap: str, bridge: str) -> None:
    """Raises HostError; then it is in no bridge, rather than in one without its VLAN."""
    if card.vlan is None:
        add_port(bridge, tap)
        return
    what = want_vlans(card, bridge)
    run(["ip", "link", "set", "dev", tap, "down"], what)        # as long as it is in the bridge's own VLAN
    try:
        run(["ip", "link", "set", "dev", tap, "master", bridge], what)
        join_vlan(card, tap, bridge)
    except HostError:
        run(["ip", "link", "set", "dev", tap, "nomaster"], what)
        run(["ip", "link", "set", "dev", tap, "up"], what)
        raise
    run(["ip", "link", "set", "dev", tap, "up"], what)
