"""Debian's cloud kernel with an initramfs: up with every CPU, with and without ACPI, and ended as it was told."""
import time

import pytest

from tests.guest.guest import BOOT_SECONDS, POWERED_OFF, RESET

QUIET = "console=ttyS0 panic=-1 quiet"


@pytest.mark.parametrize("vcpus", [1, 4])
def test_it_comes_up_with_all_cpus_and_memory_and_powers_off(boot, vcpus):
    guest = boot(append=QUIET, vcpus=vcpus, memory=600)
    found = guest.expect(r"GUEST UP: Linux \S+-cloud-amd64, (\d+) CPU, (\d+) kB", BOOT_SECONDS)
    assert int(found[1]) == vcpus
    assert 500 * 1024 < int(found[2]) < 600 * 1024
    assert guest.wait() == POWERED_OFF


@pytest.mark.parametrize(("vcpus", "tables"), [(1, True), (4, False)], ids=["acpi=off", "no-acpi"])
def test_without_acpi_it_comes_up(boot, vcpus, tables):
    """The cloud kernel was built without the MP table: with no ACPI it knows one CPU and the old interrupt controller."""
    guest = boot(append=QUIET + (" acpi=off" if tables else "") + " then=reboot", vcpus=vcpus, acpi=tables)
    assert guest.expect(r"GUEST UP: \S+ \S+ (\d+) CPU", BOOT_SECONDS)[1] == "1"
    assert guest.wait() == RESET


@pytest.mark.parametrize("tables", [True, False], ids=["acpi=off", "no-acpi"])
def test_the_mp_table_tells_of_all_cpus_and_interrupts(boot, lab, tables):
    """Debian's other kernel reads it. The ELF file is started by its PVH note."""
    append = f"{QUIET}{' acpi=off' if tables else ''} modules=none run=cat,/proc/interrupts then=reboot"
    guest = boot(kernel=lab / "vmlinux-amd64", append=append, vcpus=4, acpi=tables)
    assert guest.expect(r"GUEST UP: Linux \S+-amd64, (\d+) CPU", BOOT_SECONDS)[1] == "4"
    guest.expect(r"IO-APIC.*ttyS0")
    assert guest.wait() == RESET


def test_more_memory_than_fits_below_the_pci_hole(boot):
    guest = boot(append=f"{QUIET} run=grep,'RAM$',/proc/iomem", memory=3584)
    assert int(guest.expect(r"GUEST UP: .* (\d+) kB", BOOT_SECONDS)[1]) > 3300 * 1024
    guest.expect("^100000000-1")
    assert guest.wait() == POWERED_OFF


def test_reboot_starts_the_guest_again(boot):
    guest = boot(append=f"{QUIET} shell=ttyS0 then=reboot", reboots=True)
    for _ in range(2):
        guest.expect("GUEST UP", BOOT_SECONDS)
        guest.expect("# ")
        guest.send("exit")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


@pytest.mark.parametrize("way", ["k", "a", "t"])
def test_reboot_ends_the_run_when_it_shall_not_start_again(boot, way):
    """By the keyboard controller, by ACPI's reset register, and by a triple fault."""
    guest = boot(append=f"{QUIET} reboot={way} then=reboot")
    guest.expect("GUEST UP", BOOT_SECONDS)
    assert guest.wait() == RESET


def test_panic_shows_its_message_and_resets(boot):
    guest = boot(append=f"{QUIET} then=panic")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("Kernel panic - not syncing: sysrq triggered crash")
    assert guest.wait() == RESET


@pytest.mark.parametrize("vcpus", [1, 4])
def test_the_power_button_reaches_the_guest(boot, vcpus):
    guest = boot(append=f"{QUIET} then=wait", vcpus=vcpus)
    guest.expect("waiting for the power button", BOOT_SECONDS)
    guest.press_power_button()
    guest.expect("power button pressed")
    assert guest.wait() == POWERED_OFF


def test_time_goes_on(boot):
    """The guest's clock is the host's, by RTC at boot, and keeps pace with it."""
    guest = boot(append=f"{QUIET} shell=ttyS0")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    first, before = int(guest.run("date +%s")), time.time()
    assert abs(first - before) < 30
    guest.run("sleep 5")
    assert abs((int(guest.run("date +%s")) - first) - (time.time() - before)) <= 2
    guest.send("exit")
    assert guest.wait() == POWERED_OFF
