"""`kvmapp licenses`: what the one file is made of, from the list that its build put inside (onefile/inventory.py)."""
from __future__ import annotations

import json
import os

from kvmapp import __version__, runtime
from kvmapp.errors import UsageError

ABOUT = "Every part that is inside, with its version and licence; with a part's name the text of its licence."
OURS = "kvmapp", __version__, "GPL-2.0-or-later"


def main(arguments: list[str]) -> int:
    """Every part in a line; with a part's name the text of its licence."""
    if "--help" in arguments:
        print(f"usage: kvmapp licenses [PART]\n\n{ABOUT}")
        return 0
    if arguments and arguments[0].startswith("-"):
        raise UsageError(f"unknown option '{arguments[0]}'", "kvmapp licenses [PART]")
    if len(arguments) > 1:
        raise UsageError(f"kvmapp licenses takes one part's name, got {' '.join(arguments)}")
    if arguments:
        print(text_of(arguments[0]), end="")
        return 0
    parts = [OURS, *parts_inside()]
    widths = [max(len(part[column]) for part in parts) for column in (0, 1)]
    for name, version, licence in parts:
        print(f"{name:{widths[0]}}  {version:{widths[1]}}  {licence}")
    return 0


def parts_inside() -> list[tuple[str, str, str]]:
    """None from source: there everything is the host's own."""
    if not runtime.FROZEN:
        return []
    with open(folder("sbom.json"), encoding="utf-8") as file:
        components = json.load(file)["components"]
    return [(part["name"], part["version"], part["licenses"][0]["license"]["name"]) for part in components]


def text_of(name: str) -> str:
    if not runtime.FROZEN:
        raise UsageError("From source there are no licence texts inside", "COPYING is kvmapp's; the host has those of its own parts")
    there = sorted(os.listdir(folder("licences")))
    if name not in there:
        raise UsageError(f"There is no licence text of '{name}'", f"there are those of {', '.join(there)}")
    with open(folder("licences", name), encoding="utf-8") as file:
        return file.read()


def folder(*names: str) -> str:
    return os.path.join(runtime.tree(), "runtime/lib", *names)
