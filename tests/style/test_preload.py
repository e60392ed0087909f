"""A domain process has given root's rights up, and may not be allowed to read the folder that kvmapp lies in: it imports nothing."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("machine", "netcards", "slots", "snapshot", "saving", "statefile", "tuning", "vmprocess", "vmdevices", "vmsaving", "control",
         "console", "loop", "cardfiles", "cpuset", "kvmstats", "layout", "state", "config", "values", "settings", "errors",
         "places", "boot", "block", "hw", "net", "virtio")
# Needed while the process is root still: files and command lines are read, and kernels are unpacked into root's folder.
EARLIER = {"kvmapp.ini", "kvmapp.initree", "kvmapp.options", "hashlib", "lzma", "bz2", "backports", "lz4.block"}


def late_imports(path: Path) -> set[str]:
    """The modules that functions of this file import."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module == "kvmapp":
                    found |= {f"kvmapp.{alias.name}" for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module)
    return found


def test_whatever_a_domain_may_come_to_import_the_zygote_has():
    files = [path for room in ROOMS for path in [*ROOT.glob(f"kvmapp/{room}.py"), *(ROOT / "kvmapp" / room).rglob("*.py")]]
    wanted = {name: path for path in files for name in late_imports(path)}
    assert {"kvmapp.kvmstats", "kvmapp.net.user"} <= set(wanted), "the test looks at too little"
    code = "import sys; from kvmapp.vmprocess import preload; preload(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                            check=True).stdout.split()
    late = {name: str(path.relative_to(ROOT)) for name, path in wanted.items() if name not in loaded and name not in EARLIER}
    assert not late, f"preload.py lacks {late}"
