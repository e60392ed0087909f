"""Prints the performance tables: python -m bench [TABLE [OPTIONS...]]; without a name, all of them, as their options stand.

A table is a module of this folder with a `main(arguments)`; each compares with a peer in the same run, for absolute times say
more about the host's mood than about us. One that cannot be had on this host costs a line and the exit status, not the others.
"""
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from kvmapp.errors import KvmappError

TABLES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    wanted, arguments = sys.argv[1:2], sys.argv[2:]
    if wanted and wanted[0] not in TABLES:
        raise SystemExit(f"error: no table '{wanted[0]}'\nhint: there are {', '.join(TABLES)}")
    if wanted:
        import_module(f"bench.{wanted[0]}").main(arguments)
        return
    failed = [name for name in TABLES if not told(name)]
    if failed:
        raise SystemExit(f"error: no table from {', '.join(failed)}")


def told(name: str) -> bool:
    """Prints one table, or why not. Many end the process, with the status of the lab where they were told."""
    print(f"\n== {name}", flush=True)
    try:
        import_module(f"bench.{name}").main([])
    except SystemExit as end:
        if end.code:
            print(end.code if isinstance(end.code, str) else f"error: {name}: status {end.code}", file=sys.stderr, flush=True)
        return not end.code
    except (KvmappError, OSError, RuntimeError, subprocess.SubprocessError) as error:      # a device or a program that is not here
        print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    main()
