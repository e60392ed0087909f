"""Rate limits of one tap, by tc(8): what goes to the guest waits in an HTB class, what comes from it is policed.

tc-htb(8), tc-police(8). The units are libvirt's: kilobytes a second (1000 bytes), bursts in KiB. The kernel takes both away with the
tap. Left out: `floor`, which would want a class of the bridge as well.
"""
from __future__ import annotations

from kvmapp.daemon.hostnet import ask, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import InterfaceConfig

RATES = tuple(f"{way}_{what}" for way in ("in", "out") for what in ("average", "peak", "burst"))
LARGEST = 128                           # KiB that a policer must let through at once: a segmented frame of 64 KiB with all its headers


def is_limited(card: InterfaceConfig) -> bool:
    return card.in_average is not None or card.out_average is not None


def apply(card: InterfaceConfig, tap: str) -> None:
    """Whatever limits there were give way to these. Raises HostError."""
    what = f"limit the rates of {card.heading}'s tap '{tap}'"
    there = {part.get("kind") for part in ask(["tc", "qdisc", "show", "dev", tap], what)}
    lines = [f"qdisc del dev {tap} root"] * ("htb" in there) + [f"qdisc del dev {tap} ingress"] * ("ingress" in there)
    lines += to_guest(card, tap) + from_guest(card, tap)
    if lines:
        run(["tc", "-batch", "-"], what, "\n".join(lines) + "\n")


def to_guest(card: InterfaceConfig, tap: str) -> list[str]:
    if card.in_average is None:
        return []
    words = [f"class add dev {tap} parent 1: classid 1:1 htb rate {card.in_average}kbps"]
    words += [f"ceil {card.in_peak}kbps"] if card.in_peak else []
    words += [f"burst {card.in_burst}kb"] if card.in_burst else []
    return [f"qdisc add dev {tap} root handle 1: htb default 1", " ".join(words)]


def from_guest(card: InterfaceConfig, tap: str) -> list[str]:
    """Without a burst, what goes in a second: TCP does not get up to the rate when every peak of it is cut off."""
    if card.out_average is None:
        return []
    burst = max(card.out_burst or card.out_average, LARGEST)
    peak = f"peakrate {card.out_peak}kbps " if card.out_peak and card.out_peak > card.out_average else ""
    return [f"qdisc add dev {tap} ingress",
            f"filter add dev {tap} parent ffff: protocol all u32 match u32 0 0 "
            f"police rate {card.out_average}kbps burst {burst}kb mtu {LARGEST}kb {peak}drop flowid :1"]
