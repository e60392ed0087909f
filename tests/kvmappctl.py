"""kvmappctl as a program of its own, wherever it is started."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KVMAPPCTL = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kvmapp.cli.main import run; run(sys.argv[1:])"]
