"""Saved states of every version (golden/README.md): each is restored, and together they hold every kind of device."""
import gzip
from collections.abc import Iterator

import pytest

from kvmapp import schema, snapshot, statefile
from kvmapp.config import read_domain
from kvmapp.settings import is_ahead
from tests.device.profiles import PROFILES
from tests.kvm.counting import COUNTER
from tests.kvm.golden import FOLDER, lay_out

GOLDEN = sorted(FOLDER.glob("*.save.gz"))
OF_THIS_VERSION = {path.name.split("-")[1].removesuffix(".save.gz"): path for path in GOLDEN if "-" in path.name}
# Kinds of device that no golden file holds, and why.
WITHOUT = {"VirtioFs": "what its guest has open lives in the file server: such a domain cannot be saved"}
# Sections that no golden machine has, and why.
BARE = {"filesystem": WITHOUT["VirtioFs"], "cputune": "the host's side", "vcpu": "the host's side", "numatune": "the host's side",
        "memtune": "the host's side"}

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_files_of_every_version_are_restored(guest, tmp_path, path):
    saved = unpacked(path, tmp_path)
    with open(saved, "rb") as file:
        statefile.read(file.fileno(), path.name).verify()
    one = guest(*words_of(path, tmp_path), "--restore", saved)
    one.count(3)
    assert one.counts == list(range(one.counts[0], one.counts[0] + len(one.counts)))
    assert one.counts[0] > 1


def unpacked(path, folder):
    saved = folder / "golden.save"
    saved.write_bytes(gzip.decompress(path.read_bytes()))
    return saved


def words_of(path, folder):
    """What `kvmapp run` is to be given for the machine of a golden file."""
    if "-" in path.name:
        return [lay_out(path.name.split("-")[1].removesuffix(".save.gz"), folder)]
    lay_out("pc", folder)                                # the first one's machine had no file
    return [*COUNTER, "--disk", folder / "disk.img", "--net", "user,mac=52:54:00:00:00:01"]


def test_there_are_golden_files_of_each_machine():
    assert set(OF_THIS_VERSION) == {path.stem for path in FOLDER.glob("*.conf")} and len(GOLDEN) > len(OF_THIS_VERSION)


def test_golden_files_hold_every_kind_of_device(tmp_path):
    """What a later version is to read is only tried for what is in one."""
    held = {kind for machine in OF_THIS_VERSION for kind in kinds_in(machine, tmp_path)}
    wanted = {kind for profile in PROFILES for kind in profile.kinds}
    missing = {kind.__name__ for kind in wanted if not any(issubclass(one, kind) for one in held)}
    assert missing == set(WITHOUT)


def kinds_in(machine, folder) -> Iterator[type]:
    with open(unpacked(OF_THIS_VERSION[machine], folder), "rb") as file:
        restored = snapshot.restore(statefile.read(file.fileno(), machine), read_domain(str(lay_out(machine, folder))))
        try:
            for device in [*restored.devices, *(card.device for card in restored.cards.values() if hasattr(card, "device"))]:
                yield type(device)
        finally:
            restored.close()


def test_the_golden_machine_has_every_section():
    """A section that is new belongs into the golden machine, or into the list above."""
    text = (FOLDER / "pc.conf").read_text()
    known = {kind for kind, section in schema.DOMAIN.sections.items() if not is_ahead(section.since)}
    assert {kind for kind in known if f"\n[{kind}" not in text} == set(BARE)
