"""docs/man/kvmapp.1, made from the parsers of its verbs: `python -m kvmapp.manual` writes it into the checkout.

A test holds the committed page to what comes out here. kvmappctl's page is made in cli/manual.py, the files' in samples.py.
"""
from __future__ import annotations

import os

from kvmapp import __version__, check, install, licences
from kvmapp.daemon.main import make_parser as make_daemon_parser
from kvmapp.options import RUN_EXTRAS, run_options
from kvmapp.samples import roff

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser

PATH = "docs/man/kvmapp.1"
ABOUT = ("kvmapp makes a plain Linux host a host of virtual machines. It is one program with several verbs; kvmappctl(1), by which "
         "virtual machines are managed day by day, is one more of its names.")
RUN = ("One guest in the foreground, its first serial port on the terminal, described by a domain file (kvmapp-domain(5)), by options, "
       "or by both. It needs no daemon. Ctrl-] ends the guest; SIGTERM presses its power button, a second one ends it.")
RUN_STATUSES = (("0", "The guest powered off."), ("1", "It could not be started, or kvmapp failed."),
                ("3", "The guest reset itself, with --no-reboot."), ("4", "The guest crashed."), ("5", "It was ended from here."),
                ("6", "It was saved, by SIGUSR1 with --save."),
                ("2N+1", "The guest wrote N to its debug exit port."))
SIGNALS = (("SIGTERM, SIGINT", "Stop. Domains run on, and the next daemon finds them."),
           ("SIGHUP", "Read the configuration again and open the log anew."),
           ("SIGKILL", "Hurts no guest; the next daemon needs no clearing up after it."))
FILES = (("/etc/kvmapp/", "The configuration: kvmapp.conf(5), domains/, networks/; storage/ is for pools, which are not there yet."),
         ("/etc/kvmapp/domains/autostart/", "Links to the domains that start with the host."),
         ("/run/kvmapp/kvmapp.sock", "The daemon's socket; members of group kvmapp may use it, and are as powerful as root by it."),
         ("/run/kvmapp/kvmapp-sock-ro", "The socket for those who only look."),
         ("/run/kvmapp/kvmapp.pid", "Locked while the daemon runs; the number in it is for people."),
         ("/var/log/kvmapp/NAME.log", "One log a domain."),
         ("/var/log/kvmapp-daemon.log", "The daemon's, when it runs in the background."),
         ("/var/lib/kvmapp/", "Images and kernels, and the note of what setup laid down."),
         ("/usr/lib/kvmapp/", "The program: a folder for each version that runs, and `current`, a link to the one in use."),
         ("/run/kvmapp/kvmapp-sock-quick", "A warm process beside the daemon answers kvmappctl here, with the caller's own rights."),
         ("/etc/init.d/kvmapp, /etc/init.d/kvmapp-guests", "Start the daemon; shut the domains down with the host. systemd has "
                                                           "units of the same names."))


def manual() -> str:
    lines = ['.\\" Made by python -m kvmapp.manual from the parsers of the verbs: change it there.',
             f'.TH KVMAPP 1 "" "kvmapp {__version__}" "User commands"', ".SH NAME", "kvmapp \\- virtual machines in one file",
             ".SH SYNOPSIS", ".B kvmapp run", roff("[FILE] [OPTIONS]"), ".br", ".B kvmapp check", roff("[--boot] [--json]"), ".br",
             ".B kvmapp setup", roff("[OPTIONS]"), ".br", ".B kvmapp licenses", roff("[PART]"),
             ".br", ".B kvmapp daemon", roff("[OPTIONS]"), ".br", ".B kvmapp ctl",
             roff("[WORDS OF kvmappctl]"), ".SH DESCRIPTION", roff(ABOUT), ".SH RUN", roff(RUN)]
    for option in run_options().values():
        lines += entry(f"{option.flag} {option.metavar}".rstrip(), option.help)
    for flag, metavar, text in RUN_EXTRAS:
        lines += entry(f"{flag} {metavar}".rstrip(), text)
    lines += [".PP", "Its exit status tells how the guest ended:"]
    for status, meaning in RUN_STATUSES:
        lines += entry(status, meaning)
    lines += [".SH CHECK", roff(check.ABOUT), ".SH LICENSES", roff(licences.ABOUT)]
    for title, parser in (("SETUP", install.make_parser()), ("DAEMON", make_daemon_parser())):
        lines += [f".SH {title}", roff(parser.description or ""), *options_of(parser)]
    lines += [".PP", "Signals:"]
    for title, entries in (("", SIGNALS), ("FILES", FILES)):
        lines += [f".SH {title}"] if title else []
        for name, text in entries:
            lines += entry(name, text)
    lines += [".SH SEE ALSO", ".BR kvmappctl (1),", ".BR kvmapp\\-domain (5),", ".BR kvmapp\\-network (5),", ".BR kvmapp.conf (5)"]
    return "\n".join(lines) + "\n"


def entry(name: str, text: str) -> list[str]:
    return [".TP", f".B {roff(name)}", roff(text)]


def options_of(parser: ArgumentParser) -> list[str]:
    lines: list[str] = []
    for action in parser._actions:
        if action.option_strings and action.help and "==SUPPRESS==" not in action.help and action.dest not in ("help", "version"):
            text = action.help[:1].upper() + action.help[1:] + "."
            lines += entry(f"{', '.join(action.option_strings)} {action.metavar or ''}".rstrip(), text)
    return lines


def main() -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(root, PATH), "w", encoding="utf-8") as stream:
        stream.write(manual())


if __name__ == "__main__":
    main()
