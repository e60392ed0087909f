"""Makes this version's golden file (golden/README.md). Needs a KVM."""
import gzip
import sys
import tempfile
from pathlib import Path

from kvmapp import __version__
from tests.kvm.test_snapshot import Guest, golden_words


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        disk, saved = Path(folder, "disk.img"), Path(folder, "golden.save")
        disk.write_bytes(bytes(1 << 20))
        guest = Guest(*golden_words(disk), "--save", saved)
        guest.count(3)
        log = guest.save()
        if guest.process.returncode != 6:
            print(log, file=sys.stderr)
            return 1
        target = Path(__file__).with_name("golden") / f"{__version__}.save.gz"
        target.write_bytes(gzip.compress(saved.read_bytes(), mtime=0))
        print(f"{target}: {target.stat().st_size} bytes")
        return 0


if __name__ == "__main__":
    sys.exit(main())
