"""help, --help and -V: made from the verbs' own tables, in the shape of virsh's."""
from __future__ import annotations

from kvmapp.cli.index import GROUP_ALIASES, GROUPS, MODULES, find
from kvmapp.cli.table import FLAG, METAVARS, Option, Verb, value, verb
from kvmapp.errors import UsageError

WIDTH = 72


@verb("help", "what there is, or how a command or a group of them is used",
      value("command", "a command, or a group's keyword", complete="verb"))
def help(session, given):
    name = given.command
    if name is None:
        session.answer(groups_dict(GROUPS), lambda: groups_text())
    elif name in MODULES:
        found = find(name)
        assert found
        session.answer(verb_dict(found), lambda: verb_text(found))
    elif GROUP_ALIASES.get(name, name) in GROUPS:
        keyword = GROUP_ALIASES.get(name, name)
        session.answer(groups_dict({keyword: GROUPS[keyword]}), lambda: group_text(keyword))
    else:
        from kvmapp.cli.parse import nearest_hint
        raise UsageError(f"command or command group '{name}' doesn't exist", nearest_hint(name, [*MODULES, *GROUPS]))


def verbs_of(keyword: str) -> list[Verb]:
    names = sorted(name for names in GROUPS[keyword][1].values() for name in names)
    return [found for found in map(find, names) if found]


def groups_text() -> str:
    return "Grouped commands:\n\n" + "\n".join(group_text(keyword) for keyword in GROUPS)


def group_text(keyword: str) -> str:
    lines = [f" {GROUPS[keyword][0]} (help keyword '{keyword}'):"]
    return "\n".join(lines + [f"    {one.name:<30} {one.help}" for one in verbs_of(keyword)]) + "\n"


def verb_text(verb: Verb) -> str:
    import textwrap
    lines = ["  NAME", f"    {verb.name} - {verb.help}", "", "  SYNOPSIS"]
    lines += textwrap.wrap(" ".join([verb.name, *map(synopsis, verb.options.values())]), WIDTH + 20, initial_indent="    ",
                           subsequent_indent="      ", break_on_hyphens=False, break_long_words=False)
    if verb.text:
        lines += ["", "  DESCRIPTION"]
        lines += textwrap.wrap(verb.text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    lines += ["", "  OPTIONS"]
    for option in verb.options.values():
        lines.append(f"    {label(option):<16} {option.help}" if len(label(option)) <= 16 else f"    {label(option)}  {option.help}")
    lines += [f"    {'--json':<16} print JSON", f"    {'--help':<16} this help"]
    return "\n".join(lines) + "\n\n"


def synopsis(option: Option) -> str:
    """<domain>, [--all], [--timeout <number>], [<string>]..."""
    if option.many:
        return f"[<{option.name}>]..."
    if option.required:
        return f"<{option.name}>"
    return f"[{dashed(option)}]"


def dashed(option: Option) -> str:
    return f"--{option.name}" + ("" if option.kind == FLAG else f" <{METAVARS[option.kind]}>")


def label(option: Option) -> str:
    short = f"-{option.short} | " if option.short else ""
    if option.required or (option.many and not option.named):
        return f"[--{option.name}] <{METAVARS[option.kind]}>"
    return short + dashed(option)


def groups_dict(groups: dict) -> dict:
    return {"groups": [{"keyword": keyword, "title": title, "commands": [{"name": one.name, "help": one.help}
                                                                         for one in verbs_of(keyword)]}
                       for keyword, (title, _) in groups.items()]}


def verb_dict(verb: Verb) -> dict:
    return {"name": verb.name, "help": verb.help, "description": verb.text or None,
            "options": [{"name": option.name, "kind": option.kind, "required": option.required, "many": option.many,
                         "help": option.help} for option in verb.options.values()]}


def usage(options) -> str:
    """What --help prints."""
    lines = ["", "kvmappctl [options]... [<command_string>]", "kvmappctl [options]... <command> [args...]", "", "  options:"]
    lines += [f"    {global_label(option):<31} {option.help}" for option in options]
    return "\n".join(lines) + "\n\n  commands (non interactive mode):\n\n" + "\n".join(map(group_text, GROUPS)) + (
        "\n  (specify help <group> for details about the commands in the group)\n"
        "\n  (specify help <command> for details about the command)\n\n")


def global_label(option) -> str:
    """-c | --connect=URI"""
    short = f"-{option.short}" if option.short else ""
    long = f"--{option.name}" if option.name else ""
    metavar = f"[{option.metavar}]" if option.metavar.startswith("=") else f"={option.metavar}" if option.metavar else ""
    return " | ".join(filter(None, (short, long))) + metavar


def version(long: bool) -> str:
    from kvmapp import __version__
    if not long:
        return f"{__version__}\n"
    import sys
    python = ".".join(map(str, sys.version_info[:3]))
    return f"kvmappctl, the command line of kvmapp {__version__}\nPython {python}\nLicense: GPL-2.0-or-later\n"
