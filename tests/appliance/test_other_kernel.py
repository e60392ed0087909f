"""A guest outlives its host's kernel: stock Debian with two vCPUs at work is saved, and goes on under another release of Linux, newer
than the one that it was started under, and then under the first one again.

Chapters of one story, told by one host, as in test_appliance.py.
"""
import pytest

from tests.appliance.host import PATIENCE, PlainHost

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1500)]

OTHER = "6.12"
DISK = "/var/tmp/root.img"


@pytest.fixture(scope="module")
def host():
    one = PlainHost()
    try:
        one.boot()
        yield one
    finally:
        one.close()


def working(host, step):
    """tests/guest/working.py does it, and says what it saw: all of it is shown when something was wrong."""
    said = host.run(f"cd /src && python3 -m tests.guest.working {step} {DISK} /var/tmp/saved", 2 * PATIENCE)
    print(said.out)
    assert said.status == 0, host.story()


def test_a_guest_at_work_is_saved(host):
    assert not host.says("uname -r").startswith(OTHER)
    host.says(f"e2image -ra /lab/root.img {DISK} >/dev/null 2>&1")
    working(host, "start")


def test_it_goes_on_under_the_other_kernel_and_is_saved_there(host):
    host.kernel = OTHER
    host.reboot()
    assert host.says("uname -r").startswith(OTHER)
    working(host, "go-on")


def test_it_goes_on_under_the_first_kernel_and_its_disk_is_whole(host):
    host.kernel = ""
    host.reboot()
    assert not host.says("uname -r").startswith(OTHER)
    working(host, "end")
