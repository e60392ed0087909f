"""What is written from schema.py's table for people: the samples in conf/ and the man pages of the file formats.

    python -m kvmapp.samples          writes them into the checkout that this module stands in

A test holds the committed files to what comes out here. Settings that this version does not honour yet are left out.
"""
from __future__ import annotations

import os
import textwrap

from kvmapp import __version__, schema
from kvmapp.ini import quote
from kvmapp.settings import is_ahead

# What stands in a sample uncommented: heading, then the keys with their texts (None: the example of the table).
Preset = dict[str, dict[str, "str | None"]]
EXAMPLE_DOMAIN: Preset = {
    "": {"name": None, "memory": None},
    "boot": {"kernel": None, "initrd": None, "cmdline": None},
    "disk vda": {"source": None},
    "interface 0": {"type": "bridge", "source": None},
    "serial 0": {},
}
DEFAULT_NETWORK: Preset = {
    "": {"name": None, "mode": "nat"},
    "ipv4": {"address": None, "dhcp": None},
}
GRAMMAR = (
    "The file is UTF-8 text of lines \\fIkey\\fR = \\fIvalue\\fR, under headings [\\fIsection\\fR] or "
    "[\\fIsection word\\fR]. What follows a # at the start of a line or after a space is a comment. A value that begins "
    "or ends with spaces, or holds a #, stands in quotes of either kind; one of several lines in triple quotes. Unknown "
    "sections and keys are errors. kvmapp keeps comments and order when it rewrites the file, and saves it as a whole or "
    "not at all.",
    "yes, on and true mean the same, as do no, off and false. In sizes KiB, MiB, GiB and TiB, or K, M, G and T, count in "
    "1024s; KB, MB, GB and TB in 1000s. Times are in s, min or h; a bare number in seconds. Relative paths belong to the "
    "folder of the file.",
)


def generate() -> dict[str, str]:
    """Every generated file, by its path in the checkout."""
    return {
        "conf/kvmapp.conf": sample(schema.DAEMON, {}, "kvmapp.conf(5)"),
        "conf/guest.conf": sample(schema.GUEST, {}, "kvmapp.conf(5)"),
        "conf/domains/example.conf.sample": sample(schema.DOMAIN, EXAMPLE_DOMAIN, "kvmapp-domain(5)"),
        "conf/networks/default.conf": sample(schema.NETWORK, DEFAULT_NETWORK, "kvmapp-network(5)"),
        "docs/man/kvmapp-domain.5": manual("kvmapp-domain", "a domain's configuration file", [schema.DOMAIN], EXAMPLE_DOMAIN),
        "docs/man/kvmapp-network.5": manual("kvmapp-network", "a virtual network's configuration file", [schema.NETWORK],
                                            DEFAULT_NETWORK),
        "docs/man/kvmapp.conf.5": manual("kvmapp.conf", "settings of the kvmapp daemon and of all guests",
                                         [schema.DAEMON, schema.GUEST], {}),
    }


def honoured(settings: dict[str, schema.Setting]) -> list[schema.Setting]:
    return [setting for setting in settings.values() if not is_ahead(setting.since)]


def sections_of(file: schema.File) -> list[schema.Section]:
    return [section for section in (file.top, *file.sections.values()) if not is_ahead(section.since)]


def example_of(setting: schema.Setting) -> str:
    """The default, or what the table gives where the default shows nothing."""
    shown = setting.default not in (None, [], "")
    return setting.kind.format(setting.default) if shown else setting.example


def heading_of(section: schema.Section) -> str:
    return f"{section.kind} {example_of(section.word)}" if section.word else section.kind


# The samples in conf/

def sample(file: schema.File, preset: Preset, page: str) -> str:
    lines = [*comment(f"/etc/kvmapp/{file.path}: {file.help[0].lower()}{file.help[1:]} See {page}."), "#",
             *comment("What is commented out is at its default, or not there; an example is shown where there is no default."),
             ""]
    for section in sections_of(file):
        heading = heading_of(section)
        live = preset.get(heading)
        if heading:
            lines += [*comment(section.help), f"[{heading}]" if live is not None else f"#[{heading}]"]
        for setting in honoured(section.settings):
            text = (live or {}).get(setting.key, "")
            lines += comment(setting.help)
            lines += [f"#{setting.key} = {quote(example_of(setting))}" if text == "" else
                      f"{setting.key} = {quote(text or setting.example)}"]
        lines.append("")
    return "\n".join(lines)


def comment(text: str) -> list[str]:
    return textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


# The man pages

def manual(name: str, what: str, files: list[schema.File], preset: Preset) -> str:
    """roff of the man macros; every line begins with a macro or with plain text."""
    lines = ['.\\" Made by python -m kvmapp.samples from the table in kvmapp/schema.py: change it there.',
             f'.TH {name.upper()} 5 "" "kvmapp {__version__}" "File formats"', ".SH NAME", f"{name} \\- {roff(what)}",
             ".SH SYNOPSIS", "\n.br\n".join(f".I /etc/kvmapp/{file.path}" for file in files), ".SH DESCRIPTION"]
    lines += [roff(" ".join(file.help for file in files))]
    for paragraph in GRAMMAR:
        lines += [".PP", roff(paragraph, fonts=True)]
    for file in files:
        for section in sections_of(file):
            lines += section_manual(file, section, several=len(files) > 1)
    if preset:
        lines += [".SH EXAMPLE", ".nf", *(roff(line) for line in minimal(files[0], preset)), ".fi"]
    lines += [".SH SEE ALSO", ".BR kvmapp (1),", ".BR kvmappctl (1)"]
    return "\n".join(lines) + "\n"


def section_manual(file: schema.File, section: schema.Section, several: bool) -> list[str]:
    title = section.shape if section.kind else file.path if several else "Before the first heading"
    lines = [f".SH {roff(title)}", roff(file.help if several and not section.kind else section.help)]
    if section.word:
        lines += [".TP", f".B {section.word.kind.metavar}", roff(f"{section.word.help} Expected: "
                                                                 f"{section.word.kind.describe()}.")]
    for setting in honoured(section.settings):
        lines += [".TP", f".B {roff(setting.key)}", roff(setting.help), ".br", roff(facts(setting))]
    return lines


def facts(setting: schema.Setting) -> str:
    facts = [f"Expected: {setting.kind.describe()}."]
    if setting.required:
        facts.append("Required.")
    if setting.default not in (None, [], ""):
        facts.append(f"Default: {setting.kind.format(setting.default)}.")
    if setting.live:
        facts.append("May change while the guest runs.")
    if setting.since != "0.1":
        facts.append(f"Since version {setting.since}.")
    return " ".join(facts)


def minimal(file: schema.File, preset: Preset) -> list[str]:
    lines = []
    for heading, texts in preset.items():
        section = file.sections[heading.partition(" ")[0]] if heading else file.top
        lines += [f"[{heading}]"] if heading else []
        lines += [f"{key} = {quote(text or section.settings[key].example)}" for key, text in texts.items()]
    return lines


def roff(text: str, fonts: bool = False) -> str:
    if not fonts:
        text = text.replace("\\", "\\e")
    text = text.replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text


def main() -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for path, text in generate().items():
        target = os.path.join(root, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w", encoding="utf-8") as stream:
            stream.write(text)


if __name__ == "__main__":
    main()
