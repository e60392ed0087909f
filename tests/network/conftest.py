"""What runs in namespaces of its own leaves nothing on the machine: looked at after each module."""
import os
import subprocess
import time

import pytest

from tests.network.namespaces import comm

PATIENCE = 60.0


def traces():
    """Of the machine itself: devices, rules, namespaces, and programs that our daemons start."""
    def said(*words):
        try:
            return subprocess.run(words, capture_output=True, text=True, check=False, timeout=180).stdout
        except FileNotFoundError:
            return ""
    return {"links": sorted(line.split()[0] for line in said("ip", "-br", "link").splitlines()),
            "rules": said("nft", "-s", "list", "ruleset"),              # without counters, which others' packets move
            "namespaces": sorted(line for line in said("ip", "netns", "list").splitlines() if line.startswith("kvt-")),
            "processes": sorted(pid for pid in os.listdir("/proc") if pid.isdigit() and comm(pid) == "dnsmasq")}


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    before = traces()
    yield
    deadline = time.monotonic() + PATIENCE              # a daemon's last programs end after it
    while traces() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert traces() == before
