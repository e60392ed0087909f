"""The daemon with true guests: its domains ended in every way a guest can end, suspended, rebooted, many at once."""
import contextlib
import os
import signal
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.imagefile import open_image
from tests.kvm.host import needs_root
from tests.smalldisk import fill, make_room, small_disk, sparse

pytestmark = [pytest.mark.kvm, needs_root]


@pytest.mark.parametrize(("cmdline", "top", "reason", "words"), [
    ("steps=none end=poweroff", "", "shutdown", "the guest powered off"),
    ("steps=none end=crash", "", "crashed", "the guest crashed"),
    ("steps=none end=triple", "on_reboot = destroy\n", "shutdown", "triple fault"),
    ("steps=none end=reset", "on_reboot = destroy\n", "shutdown", "the guest reset itself")])
def test_how_a_guest_ends(host, cmdline, top, reason, words):
    host.guest("a", cmdline, top)
    host.start()
    with contextlib.suppress(errors.KvmappError):
        host.post("a", "start")
    host.eventually(lambda: host.domain("a")["state"] == "shut off")
    one = host.domain("a")
    assert one["reason"] == reason and words in one["text"]
    assert host.records() == {}


def test_on_poweroff_restart_and_preserve(host):
    host.guest("again", "steps=none banner=hello end=poweroff", "on_poweroff = restart\n")
    host.guest("kept", "steps=none end=poweroff", "on_poweroff = preserve\n")
    host.start()
    pid = host.post("again", "start")["domain"]["pid"]
    host.eventually(lambda: host.printed("again").count("hello") > 2)
    assert host.domain("again")["pid"] == pid
    host.post("again", "destroy")
    host.post("kept", "start")
    host.eventually(lambda: host.domain("kept")["state"] == "paused")
    assert host.domain("kept")["reason"] == "shutdown"
    host.post("kept", "destroy")


def test_suspended_guest_stands_still_and_goes_on(host):
    host.guest("a", "steps=none mode=counter period=20")
    host.start()
    host.post("a", "start")
    host.eventually(lambda: host.counts("a"))
    host.post("a", "suspend")
    host.told("a", "status")                            # what the guest had printed is in the file when it answers in its next turn
    before = host.counts("a")
    host.kill()
    host.start()
    assert host.domain("a")["state"] == "paused" and host.counts("a") == before
    host.post("a", "resume")
    host.eventually(lambda: len(host.counts("a")) > len(before))
    counts = host.counts("a")
    assert counts == list(range(1, len(counts) + 1))


def test_start_paused_runs_no_instruction(host):
    host.guest("a", "steps=none mode=counter period=20")
    host.start()
    assert host.post("a", "start", paused=True)["domain"]["state"] == "paused"
    exits = host.get("a", "stats")["exits"]
    assert sum(exits.values()) == 0 and host.counts("a") == []
    host.post("a", "resume")
    host.eventually(lambda: host.counts("a"))


def test_power_button_and_a_guest_that_ignores_it(host):
    host.guest("good", "steps=none mode=counter")
    host.guest("deaf", "steps=none mode=counter button=ignore")
    host.start()
    for name in ("good", "deaf"):
        host.post(name, "start")
        host.eventually(lambda name=name: host.counts(name))
    assert host.post("good", "shutdown", timeout=60)["domain"]["reason"] == "shutdown"
    with pytest.raises(errors.GuestIgnored, match="ignores ACPI"):
        host.post("deaf", "shutdown", timeout=0.5)
    assert host.domain("deaf")["state"] == "running"


def test_reboot_restarts_in_place(host):
    host.guest("a", "steps=none mode=counter period=20 banner=hello")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    host.eventually(lambda: host.counts("a"))
    host.post("a", "reboot")
    host.eventually(lambda: host.printed("a").count("hello") == 2)
    host.eventually(lambda: host.domain("a")["state"] == "running")
    assert host.domain("a")["pid"] == pid


def test_kernel_that_cannot_be_started_is_told(host):
    host.guest("gone", "steps=none")
    host.guest("cheese", "steps=none")
    Path(host.root, "cheese").write_bytes(b"cheese" * 1000)
    for name, kernel in (("gone", "nothing"), ("cheese", "cheese")):
        host.file(name).write_text(host.file(name).read_text().replace("probe.elf", kernel))
    host.start()
    with pytest.raises(errors.KvmappError) as caught:
        host.post("gone", "start")
    assert "No such file or directory" in caught.value.message and f"{host.root}/nothing" in caught.value.message
    with pytest.raises(errors.KvmappError) as caught:
        host.post("cheese", "start")
    assert "cheese" in caught.value.message
    assert set(host.states().values()) == {"shut off"} and host.records() == {}


def test_disk_is_locked_while_its_domain_runs_and_free_afterwards(host):
    image = Path(host.root, "disk.img")
    image.write_bytes(b"\0" * (1 << 20))
    for name in ("a", "b"):
        host.guest(name, "steps=none mode=counter", rest=f"[disk vda]\nsource = {image}\n")
    host.start()
    for _ in range(3):
        pid = host.post("a", "start")["domain"]["pid"]
        with pytest.raises(errors.GuestImageError, match="it is disk 'vda' of domain 'a', which runs"):
            host.post("b", "start")
        with pytest.raises(errors.GuestImageError, match=f"it is being used by process {pid} "):     # who does not ask the daemon
            os.close(open_image("vda", str(image)))
        os.kill(pid, signal.SIGKILL)
        host.eventually(lambda: host.domain("a")["state"] == "shut off")
    host.post("b", "start")
    assert host.domain("b")["disks"][0]["source"] == str(image)
    assert host.get("b", "stats")["disks"][0]["name"] == "vda"


def test_a_disk_of_a_running_guest_becomes_larger(host):
    """And smaller; the next start and a saved state have it as it was made."""
    image = sparse(Path(host.root, "disk.img"), 1 << 20)
    host.guest("a", "steps=virtio-blk mode=counter period=20", rest=f"[disk vda]\nsource = {image}\n")
    host.start()
    host.post("a", "start")
    host.eventually(lambda: host.counts("a"))
    for size, body in ((4 << 20, {}), (2 << 20, {"shrink": True})):
        host.post("a", "disks", "resize", disk="vda", bytes=size, **body)
        assert image.stat().st_size == host.get("a", "disks")["disks"][0]["capacity"] == size
    with pytest.raises(errors.GuestImageError, match="what is at its end would be lost"):
        host.post("a", "disks", "resize", disk="vda", bytes=1 << 20)
    goes_on(host)
    assert "vda has 4194304 bytes now\n" in Path(host.paths.domain_log("a")).read_text()
    host.post("a", "suspend")
    host.post("a", "disks", "resize", disk="vda", bytes=4 << 20)
    host.post("a", "managedsave")
    assert host.post("a", "start")["domain"]["state"] == "paused"
    host.post("a", "resume")
    goes_on(host)


def test_a_disk_comes_and_goes_while_the_guest_runs(host):
    """The probe guest lets go of nothing; a reset does."""
    first, second = (str(sparse(Path(host.root, f"{name}.img"), 1 << 20)) for name in "ab")
    host.guest("a", "steps=none mode=counter period=20", rest=f"[disk vda]\nsource = {first}\n")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    host.post("a", "disks", name="vdb", settings={"source": second, "queues": "2", "serial": "B"})
    assert [disk["name"] for disk in host.get("a", "stats")["disks"]] == ["vda", "vdb"]
    assert {"name": "vdb", "slot": 2} in host.told("a", "status")["devices"]
    host.post("a", "disks", "resize", disk="vdb", bytes=2 << 20)
    with pytest.raises(errors.GuestImageError, match=f"it is being used by process {pid} "):
        os.close(open_image("vdb", second))
    with pytest.raises(errors.NameInUse, match="target vdb already exists"):
        host.post("a", "disks", name="vdb", settings={"source": first})
    goes_on(host)

    host.post("a", "managedsave")
    pid = host.post("a", "start")["domain"]["pid"]
    assert [disk["name"] for disk in host.domain("a")["disks"]] == ["vda", "vdb"]
    assert {"name": "vdb", "slot": 2} in host.told("a", "status")["devices"]
    goes_on(host)

    host.told("a", "detach-disk", device="vdb")               # past the daemon, which would wait for the guest
    assert [disk["name"] for disk in host.domain("a")["disks"]] == ["vda", "vdb"]
    host.post("a", "reset")
    host.eventually(lambda: [disk["name"] for disk in host.domain("a")["disks"]] == ["vda"])
    assert [disk["name"] for disk in host.get("a", "stats")["disks"]] == ["vda"]
    os.close(open_image("vdb", second))
    goes_on(host)
    host.post("a", "disks", name="vdc", settings={"source": second})
    assert {"name": "vdc", "slot": 2} in host.told("a", "status")["devices"] and host.domain("a")["pid"] == pid


def test_a_card_stands_at_the_next_start_where_it_stood(host):
    """Also when one before it is gone, and after a save."""
    image = sparse(Path(host.root, "a.img"), 1 << 20)
    host.guest("a", "steps=none mode=counter period=20", rest=f"[rng]\n[interface 0]\ntype = user\n[disk vda]\nsource = {image}\n")
    host.start()
    host.post("a", "start")
    host.post("a", "interfaces", settings={"type": "user"}, persistent=True)
    there = places(host)
    assert there == {"net0": 1, "vda": 2, "rng": 3, "net1": 4}
    host.post("a", "managedsave")
    host.post("a", "start")
    assert places(host) == there
    host.post("a", "interfaces", "detach", interface=host.domain("a")["interfaces"][0]["mac"], config=True)
    host.post("a", "destroy")
    host.post("a", "start")
    assert places(host) == {"vda": 2, "net1": 4, "rng": 1}


def places(host):
    return {device["name"]: device["slot"] for device in host.told("a", "status")["devices"] if device["slot"]}


def goes_on(host):
    counted = len(host.counts("a"))
    host.eventually(lambda: len(host.counts("a")) > counted)


@pytest.mark.parametrize(("top", "words"), [("machine = microvm\n", "whose devices stay as they were"), ("acpi = no\n", "has no ACPI")])
def test_a_machine_whose_disks_stay(host, top, words):
    image = str(sparse(Path(host.root, "a.img"), 1 << 20))
    host.guest("a", "steps=none mode=counter period=20", top)
    host.start()
    host.post("a", "start")
    with pytest.raises(errors.Unsupported, match=words):
        host.post("a", "disks", name="vda", settings={"source": image})
    os.close(open_image("vda", image))
    assert host.domain("a")["disks"] == []


def test_full_host_pauses_the_guest_until_there_is_room(host):
    folder = Path(host.root, "small")
    folder.mkdir()
    with small_disk(folder):
        image = sparse(folder / "disk.img", 1 << 20)
        fill(folder / "filler")
        host.guest("a", "steps=virtio-blk end=poweroff", rest=f"[disk vda]\nsource = {image}\n")
        host.start()
        host.post("a", "start")
        log = Path(host.paths.domain_log("a"))
        says = "the host has no room for what the guest writes to vda: paused; make room, then kvmappctl resume a\n"
        for times in (1, 2, 3):
            host.eventually(lambda times=times: log.read_text().count(says) == times)
            host.eventually(lambda: host.domain("a")["state"] == "paused")
            assert host.domain("a")["reason"] == "I/O error" and host.domain("a")["disks"][0]["error"] == "no space"
            with pytest.raises(errors.HostError, match="no room for what it has written to disk 'vda'") as caught:
                host.post("a", "save", file=f"{host.root}/a.save")
            assert caught.value.hint == "make room, and let the guest go on: kvmappctl resume"
            assert not os.path.exists(f"{host.root}/a.save")
            if times == 3:
                make_room(folder)
            host.post("a", "resume")
        host.eventually(lambda: host.domain("a")["state"] == "shut off")
        assert host.domain("a")["disks"][0]["error"] is None
        assert "ok virtio-blk" in host.printed("a")


def test_twenty_guests_started_at_once_and_their_cost(host):
    names = [f"g{number:02}" for number in range(20)]
    for name in names:
        host.guest(name, "steps=none mode=counter period=1000")
    host.start()
    host.start_at_once(names)
    assert set(host.states().values()) == {"running"}
    private = private_memory(host.domain("g00")["pid"])
    assert private < 16 << 20, f"{private >> 10} KiB are a guest's own, of its 32 MiB"


def private_memory(pid):
    """What the process alone holds, its guest's touched memory included."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
