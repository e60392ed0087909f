"""kvmapp as an installed program starts: from the host's own disk, compiled, and without a look for site packages.

The lab's checkout is a share of another machine's, from which every import takes its time; a copy of it does not.
"""
import atexit
import compileall
import functools
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


@functools.cache
def program() -> list[str]:
    """The words that are followed by one of kvmapp's verbs. The copy goes with this process."""
    copy = tempfile.mkdtemp(prefix="kvmapp-bench-", dir="/var/tmp")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copytree(ROOT / "kvmapp", Path(copy, "kvmapp"), ignore=shutil.ignore_patterns("*.c", "*.pyx", "*.pxd", "__pycache__"))
    compileall.compile_dir(copy, quiet=2)
    places = [copy, *(place for place in sys.path if place not in ("", str(ROOT)))]
    return [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {places!r}; from kvmapp.__main__ import entry; entry()"]
