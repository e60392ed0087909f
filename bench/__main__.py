"""Prints the performance tables: python -m bench [TABLE [OPTIONS...]]; without a name, all of them, as their options stand.

A table is a module of this folder with a `main(arguments)`; each compares with a peer in the same run, for absolute times say
more about the host's mood than about us.
"""
import sys
from importlib import import_module
from pathlib import Path

TABLES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    wanted, arguments = sys.argv[1:2], sys.argv[2:]
    if wanted and wanted[0] not in TABLES:
        raise SystemExit(f"error: no table '{wanted[0]}'\nhint: there are {', '.join(TABLES)}")
    for name in wanted or TABLES:
        import_module(f"bench.{name}").main(arguments)


if __name__ == "__main__":
    main()
