"""Options of `kvmapp run`, out of schema.py's table: which there are, how argv is parted, and how they change a
configuration.

No argparse: it would cost more time than starting the guest does. An option is `--name VALUE` or `--name=VALUE`;
`--disk`, `--net` and `--share` take sub-options, `PATH,format=raw,readonly=on`, which are the keys of their section; a comma in
a path is written twice.
"""
from __future__ import annotations

import os

from kvmapp import schema
from kvmapp.errors import UsageError
from kvmapp.values import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import NoReturn

    from kvmapp.ini import IniSections

Flags = dict[tuple[str, str], str]
Pairs = list[tuple[str, str | None]]


class Option:
    """`metavar` is empty for an option without an argument; `repeats` says that each use adds one more."""
    __slots__ = ("flag", "help", "metavar", "repeats", "section", "setting")

    def __init__(self, section: schema.Section, setting: schema.Setting | None):
        self.section, self.setting = section, setting
        self.flag = (setting or section).option
        self.help = setting.option_help if setting else section.help
        self.repeats = setting is None and section.kind in SUBOPTIONS
        if setting is None:
            self.metavar = SUBOPTIONS.get(section.kind, "")
        else:
            self.metavar = "" if setting.option_value is not None else setting.kind.metavar


SUBOPTIONS = {"disk": "PATH[,KEY=VALUE...]", "interface": "tap=NAME|bridge=NAME|network=NAME|user[,KEY=VALUE...]",
              "filesystem": "TAG=PATH[,KEY=VALUE...]"}
# What `kvmapp run` takes besides: (flag, metavar, help).
RUN_EXTRAS = (
    ("--save", "FILE", "SIGUSR1 saves the guest, memory and all, to FILE and ends it (exit status 6)."),
    ("--restore", "FILE", "Goes on from a saved state, with the configuration it was saved with unless another one is given."),
    ("--timing", "", "Shows at the end, on standard error, when the machine was built, its kernel loaded, and the guest entered; with "
     "--debug-console also when the guest wrote a line `timing: NAME` to port 0x402."),
)
# The first word of --net: which key the rest of it is.
NET_TYPES = {"tap": "target", "bridge": "source", "network": "source", "user": ""}


def run_options() -> dict[str, Option]:
    options = []
    for section in (schema.DOMAIN.top, *schema.DOMAIN.sections.values()):
        options += [Option(section, setting) for setting in section.settings.values() if setting.option]
        options += [Option(section, None)] if section.option else []
    return {option.flag: option for option in options}


def part_arguments(arguments: Sequence[str], takes_value: dict[str, bool]) -> tuple[Pairs, list[str]]:
    """argv into (option, argument) pairs and the rest; `takes_value` has every option there is."""
    pairs: Pairs = []
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            return pairs, rest + remaining
        if not word.startswith("-") or word == "-":
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in takes_value:
            unknown_option(flag, list(takes_value))
        if not takes_value[flag]:
            if equals:
                raise UsageError(f"{flag} takes no argument, got {value!r}")
            pairs.append((flag, None))
        elif equals:
            pairs.append((flag, value))
        elif remaining:
            pairs.append((flag, remaining.pop(0)))
        else:
            raise UsageError(f"{flag} wants an argument")
    return pairs, rest


def run_help() -> str:
    """What `kvmapp run --help` prints."""
    lines = ["usage: kvmapp run [FILE] [OPTIONS]", "",
             "Runs one domain in the foreground, its first serial port on the terminal; options come on top of FILE.",
             "Ctrl-] ends the guest. Exit status: 0 it powered off, 3 it was reset (with --no-reboot), 4 it crashed,",
             "5 it was ended from here, 6 it was saved, 2N+1 it ended itself by debug exit N, 1 an error.", ""]
    for option in run_options().values():
        lines.append(f"  {option.flag} {option.metavar}".rstrip())
        lines.append(f"        {option.help}")
    for flag, metavar, text in RUN_EXTRAS:
        lines += [f"  {flag} {metavar}".rstrip(), f"        {text}"]
    return "\n".join(lines) + "\n"


def unknown_option(flag: str, known: list[str]) -> NoReturn:
    from kvmapp.settings import nearest_of
    nearest = nearest_of(flag, known)
    raise UsageError(f"unknown option {flag!r}", f"did you mean {nearest}?" if nearest else "--help lists the options")


def add_options(sections: IniSections, pairs: Iterable[tuple[str, str | None]], folder: str) -> Flags:
    """Lays the options over the sections of a file. Returns which option each value came from, for messages."""
    flags: Flags = {}
    options = run_options()
    for flag, text in pairs:
        option = options.get(flag)
        if option is None:
            unknown_option(flag, list(options))
        if option.setting is not None:
            heading, key = option.section.kind, option.setting.key
            value = text if option.setting.option_value is None else option.setting.option_value
            sections.setdefault(heading, {})[key] = value or ""
            flags[heading, key] = flag
            if isinstance(option.setting.kind, Path) and value:
                sections[heading][key] = os.path.join(folder, value)
        elif option.section.kind == "disk":
            add_disk(sections, text or "", folder, flags)
        elif option.section.kind == "interface":
            add_interface(sections, text or "", flags)
        elif option.section.kind == "filesystem":
            add_filesystem(sections, text or "", folder, flags)
        elif option.section.kind == "console":
            sections.setdefault("console 0", {})["type"] = "stdio"
            sections.setdefault("serial 0", {})["type"] = "null"
        else:
            sections.setdefault(option.section.kind, {})
    return flags


def add_disk(sections: IniSections, text: str, folder: str, flags: Flags) -> None:
    first, texts = suboptions("--disk", text)
    if first:
        texts["source"] = first
    if not texts.get("source"):
        raise UsageError(f"--disk {text!r} names no file", "--disk PATH[,format=raw][,readonly=on]")
    texts["source"] = os.path.join(folder, texts["source"])
    name = texts.pop("name", None) or next(f"vd{letter}" for letter in letters() if f"disk vd{letter}" not in sections)
    put(sections, f"disk {name}", texts, "--disk", flags)


def letters() -> Iterable[str]:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    yield from alphabet
    yield from (first + second for first in alphabet for second in alphabet)
    raise UsageError("there are no more names for disks")


def add_interface(sections: IniSections, text: str, flags: Flags) -> None:
    first, texts = suboptions("--net", text)
    kind = first or next((word for word in NET_TYPES if word in texts), "")
    if kind not in NET_TYPES:
        raise UsageError(f"--net {text!r} names no type", "write tap=NAME, bridge=NAME, network=NAME or user")
    if not first:
        texts[NET_TYPES[kind]] = texts.pop(kind)
    elif NET_TYPES[kind]:
        raise UsageError(f"--net {text!r} names no {kind}", f"--net {kind}=NAME")
    texts["type"] = kind
    index = next(number for number in range(len(sections) + 1) if f"interface {number}" not in sections)
    put(sections, f"interface {index}", texts, "--net", flags)


def add_filesystem(sections: IniSections, text: str, folder: str, flags: Flags) -> None:
    first, texts = suboptions("--share", text)
    tag, _, source = first.partition("=")
    if not tag or bool(source) == ("socket" in texts):
        raise UsageError(f"--share {text!r} names no tag or no folder", "--share TAG=PATH[,readonly=on], or --share TAG,socket=PATH")
    if source:
        texts["source"] = source
    for key in ("source", "binary", "socket"):
        if texts.get(key):
            texts[key] = os.path.join(folder, texts[key])
    put(sections, f"filesystem {tag}", texts, "--share", flags)


def suboptions(flag: str, text: str) -> tuple[str, dict[str, str]]:
    """`FIRST,key=value,...`; FIRST is what stands there without a known key before its `=`."""
    first, texts = "", {}
    section = next(one for one in schema.DOMAIN.sections.values() if one.option == flag)
    known = {*section.settings, *([section.word.key] if section.word else []), *(NET_TYPES if flag == "--net" else ())}
    for number, item in enumerate(text.replace(",,", "\0").split(",")):
        item = item.replace("\0", ",")
        key, equals, value = item.partition("=")
        if number == 0 and (not equals or key not in known):
            first = item
        elif not equals:
            raise UsageError(f"{flag}: {item!r} is not KEY=VALUE", "a comma in a path is written twice")
        elif key in texts:
            raise UsageError(f"{flag}: {key} is given twice")
        else:
            texts[key] = value
    return first, texts


def put(sections: IniSections, heading: str, texts: dict[str, str], flag: str, flags: Flags) -> None:
    if heading in sections:
        raise UsageError(f"{flag}: there is a {heading} already")
    sections[heading] = texts
    for key in ("", *texts):
        flags[heading, key] = f"{flag} {key}"
