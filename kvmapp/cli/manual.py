"""docs/man/kvmappctl.1, made from the verbs' tables: `python -m kvmapp.cli.manual` writes it into the checkout.

A test holds the committed page to what comes out here.
"""
from __future__ import annotations

import os

from kvmapp import __version__
from kvmapp.cli.help import dashed, label, synopsis, verbs_of
from kvmapp.cli.index import GROUPS
from kvmapp.cli.main import GLOBAL_OPTIONS
from kvmapp.cli.table import Option, Verb
from kvmapp.samples import roff as plain_roff

PATH = "docs/man/kvmappctl.1"
ABOUT = (
    "kvmappctl is to kvmapp what virsh is to libvirt: commands, options, columns, messages and exit statuses are virsh's wherever "
    "virsh has them. It speaks to the daemon of this host, which `/etc/init.d/kvmapp start` starts.",
    "A domain is given by its Id, its UUID or its name, looked for in this order. An option may be written --name VALUE or "
    "--name=VALUE; the values of options that stand without brackets below need no --name; -- ends the options. A single argument "
    "may hold several commands, parted by semicolons. Without a command there is an interactive shell with history and completion.",
    "With --json, before a command or among its options, a command prints one line of JSON: what the daemon answered, as "
    "GET /v1/openapi.json of its socket describes it, or {\"error\": {\"code\", \"message\", \"hint\"}}.",
)
EXIT_STATUSES = (("0", "Done."), ("1", "Failed: the reason is on standard error, with a hint where there is a way out. Of several "
                                       "commands the last one counts."),
                 ("130", "Interrupted by Ctrl-C. The daemon finishes what it was asked for."),
                 ("141", "Whoever read the output has gone."))
ENVIRONMENT = (("KVMAPP_DEFAULT_URI", "The URI when there is no --connect."),
               ("VISUAL, EDITOR", "The editor of edit and desc --edit; vi when neither is set."))
FILES = (("/run/kvmapp/kvmapp.sock", "The daemon's socket; members of group kvmapp may use it."),
         ("/run/kvmapp/kvmapp-sock-ro", "The socket of --readonly, for everybody."),
         ("~/.cache/kvmapp/kvmappctl/history", "What was typed in the shell."))

# Words and what a terminal then shows; a test types them and compares.
EXAMPLES = (
    ("kvmappctl define linuxvm02.conf", "Domain linuxvm02 defined from linuxvm02.conf\nmade: uuid\n"),
    ("kvmappctl start linuxvm02", "Domain linuxvm02 started\n"),
    ("kvmappctl list", " Id   Name        State\n---------------------------\n 1    linuxvm02   running\n"),
    ("kvmappctl shutdown linuxvm02 --timeout 1",
     "error: Failed to shutdown domain 'linuxvm02'\n"
     "error: Domain 'linuxvm02' still runs 1 s after its power button was pressed: the guest ignores ACPI\n"
     "hint: acpid or systemd-logind in the guest would follow it; to end it now: kvmappctl destroy linuxvm02\n"),
    ("kvmappctl 'destroy linuxvm02; domstate linuxvm02 --reason'", "Domain linuxvm02 destroyed\n\nshut off (destroyed)\n"),
    ("kvmappctl undefine linuxvm02",
     "Domain linuxvm02 has been undefined\nremoved: file /etc/kvmapp/domains/linuxvm02.conf\n"
     "left: disk vda (/data/linuxvm02.img)\nleft: log /var/log/kvmapp/linuxvm02.log\n"),
    ("kvmappctl -q --json domid linuxvm02",
     '{"error": {"code": "domain-not-found", "message": "failed to get domain \'linuxvm02\'", "hint": null}}\n'
     "error: failed to get domain 'linuxvm02'\n"),
)


def manual() -> str:
    lines = ['.\\" Made by python -m kvmapp.cli.manual from the tables in kvmapp/cli: change it there.',
             f'.TH KVMAPPCTL 1 "" "kvmapp {__version__}" "User commands"',
             ".SH NAME", "kvmappctl \\- manage the virtual machines of this host",
             ".SH SYNOPSIS", ".B kvmappctl", roff("[OPTIONS]... [COMMAND [ARGUMENTS]...]"), ".br", ".B kvmappctl",
             roff("[OPTIONS]... 'COMMAND; COMMAND; ...'"),
             ".SH DESCRIPTION", roff(ABOUT[0])]
    for paragraph in ABOUT[1:]:
        lines += [".PP", roff(paragraph)]
    lines.append(".SH OPTIONS")
    for option in GLOBAL_OPTIONS:
        names = [f"-{option.short}"] if option.short else []
        names += [f"--{option.name}"] if option.name else []
        metavar = f"[{option.metavar}]" if option.metavar.startswith("=") else f" {option.metavar}" if option.metavar else ""
        lines += [".TP", f".B {roff(', '.join(names) + metavar)}", roff(sentence(option.help))]
    for keyword, (title, _) in GROUPS.items():
        lines += [f".SH {roff(title.upper())}", roff(f"kvmappctl help {keyword} lists these.")]
        for verb in verbs_of(keyword):
            lines += verb_lines(verb)
    for title, entries in (("EXIT STATUS", EXIT_STATUSES), ("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
        lines.append(f".SH {title}")
        for name, text in entries:
            lines += [".TP", f".B {roff(name)}", roff(text)]
    lines += [".SH EXAMPLES", "A domain's life, with a guest that does not heed its power button:", ".PP", ".nf"]
    for words, shown in EXAMPLES:
        lines += [f"\\fB# {roff(words)}\\fR", *(roff(line) for line in shown.splitlines()), ""]
    lines += [".fi", ".SH SEE ALSO", ".BR kvmapp (1),", ".BR kvmapp\\-domain (5),", ".BR kvmapp.conf (5)"]
    return "\n".join(lines) + "\n"


def verb_lines(verb: Verb) -> list[str]:
    lines = [f".SS {roff(verb.name)}", f".B {roff(' '.join([verb.name, *map(synopsis, verb.options.values())]))}", ".PP",
             roff(sentence(verb.help))]
    if verb.text:
        lines.append(roff(verb.text))
    for option in verb.options.values():
        lines += [".TP", f".B {roff(title_of(option))}", roff(sentence(option.help))]
    return lines


def title_of(option: Option) -> str:
    return f"-{option.short}, {dashed(option)}" if option.short else label(option)


def roff(text: str) -> str:
    """Marks that groff would take for accents stay what they are."""
    return plain_roff(text).replace("^", "\\(ha").replace("~", "\\(ti").replace("`", "\\(ga")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def main() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(os.path.join(root, PATH), "w", encoding="utf-8") as stream:
        stream.write(manual())


if __name__ == "__main__":
    main()
