"""Taps of a test's own, where the host has them."""
import contextlib
import os
import socket
import subprocess

import pytest


@contextlib.contextmanager
def own_tap(*more):
    """A tap's name; `more` are further words of `ip tuntap`. It is down: one that comes up before it is opened has no carrier and
    loses frames for a while."""
    if os.geteuid() or not os.path.exists("/dev/net/tun"):
        pytest.skip("NO TAPS HERE: needs root and /dev/net/tun; the tap itself is NOT tested on this machine")
    name = f"test{os.getpid()}"
    subprocess.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr", *more], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)


@contextlib.contextmanager
def host_side(name, ethertype):
    """The tap comes up; a raw socket for the frames of this type that the host sees there."""
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype)) as host:
        host.bind((name, ethertype))
        host.settimeout(20)
        yield host


def end_without_another():
    """A UDP socket whose other end has gone: what it sends is an error of its next receive. And the addresses of both."""
    ours, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for end in (ours, other):
        end.bind(("127.0.0.1", 0))
    ours.connect(other.getsockname())
    with other:
        return ours, ours.getsockname(), other.getsockname()
