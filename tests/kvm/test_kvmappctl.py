"""kvmappctl, daemon, zygote and VMM with a true guest: the probe guest (kvmapp/probe), as a user would run it."""
import pytest

from tests.kvm.host import needs_root
from tests.kvmappctl import KVMAPPCTL
from tests.unit.terminal import OnTerminal

pytestmark = [pytest.mark.kvm, needs_root]


@pytest.fixture
def host(host):
    """Its daemon runs."""
    return host.start()


@pytest.fixture
def uri(host):
    return host.uri


def test_console_of_a_true_guest(host, uri, ctl):
    host.guest("kvm01", "mode=echo console=ttyS0")
    with OnTerminal([*KVMAPPCTL, "-c", uri, "start", "kvm01", "--console"], {}) as first:
        before = first.expect("ready", within=60)
        assert before.startswith("Domain kvm01 started\r\nConnected to domain 'kvm01'\r\nEscape character is ^] (Ctrl + ])\r\n")
        first.type("hello")
        first.expect("hello")
        with OnTerminal([*KVMAPPCTL, "-c", uri, "console", "kvm01"], {}) as second:
            second.expect(f"error: Console serial0 is in use by pid {first.pid} (uid 0)\r\nhint: ")
            assert second.status() == 1
        with OnTerminal([*KVMAPPCTL, "-c", uri, "console", "kvm01", "--force"], {}) as third:
            third.expect("ready")                       # what was printed last is shown to who comes late
            first.expect("took this console over")
            assert first.status() == 0
            host.kill()                                 # the daemon may go: the console stays
            third.type("again")
            third.expect("again")
            third.type("\x1d")
            assert third.status() == 0
        with OnTerminal([*KVMAPPCTL, "-c", uri, "console", "kvm01"], {}) as fourth:
            fourth.expect("Connected to domain 'kvm01'")
            fourth.type("\x1d")
            assert fourth.status() == 0
    host.start()
    assert ctl("domstate", "kvm01")[1] == "running\n\n"
    assert ctl("shutdown", "kvm01", "--timeout", "60")[1] == "Domain kvm01 has shut down\n\n"
    assert ctl("domstate", "kvm01", "--reason")[1] == "shut off (shutdown)\n\n"


def test_guest_that_ignores_its_power_button(host, ctl):
    host.guest("kvm02", "mode=counter button=ignore")
    assert ctl("start", "kvm02")[:2] == (0, "Domain kvm02 started\n\n")
    status, _, err = ctl("shutdown", "kvm02", "--timeout", "1")
    assert status == 1 and "the guest ignores ACPI" in err and "kvmappctl destroy kvm02" in err
    assert "vm.exits.io=" in ctl("domstats", "kvm02")[1]
    assert ctl("reset", "kvm02")[1] == "Domain kvm02 was reset\n\n"
    assert ctl("destroy", "kvm02")[1] == "Domain kvm02 destroyed\n\n"
    assert ctl("domstate", "kvm02", "--reason")[1] == "shut off (destroyed)\n\n"
