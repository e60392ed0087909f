"""What a verb is made of: THE description from which come its parser, its help, its completion and its place in the manual.

    @verb("start", "start a domain that is shut off", argument("domain", "name, Id or UUID", complete="inactive"),
          flag("paused", "..."), failure="Failed to start domain '{domain}'")
    def start(session, given): ...

The shape follows virsh's own tables, so that words are read as virsh reads them (parse.py). index.py tells which module has which
verb: only that one is imported.
"""
from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Run = Callable[[Any, Any], "int | None"]

FLAG, TEXT, NUMBER, SECONDS, SIZE = "flag", "text", "number", "seconds", "size"
METAVARS = {TEXT: "string", NUMBER: "number", SECONDS: "number", SIZE: "number"}


class Option:
    """`required` ones, and others that are not `named`, may stand without their --name, in the table's order."""
    __slots__ = ("choices", "complete", "help", "key", "kind", "many", "name", "named", "required", "short")

    def __init__(self, name: str, kind: str, help: str, *, required: bool = False, named: bool = False, many: bool = False,
                 short: str = "", complete: str = "", choices: tuple[str, ...] = ()):
        self.name, self.kind, self.help = name, kind, help
        self.required, self.named, self.many, self.short = required, named, many, short
        self.complete, self.choices = complete, choices      # what completion offers: complete.py's SOURCES, or these words
        self.key = name.replace("-", "_")                    # its place in what the verb is given

    @property
    def is_data(self) -> bool:
        """virsh's kind of option that is written <name> and not --name <string>."""
        return self.required and self.kind == TEXT


def flag(name: str, help: str, short: str = "") -> Option:
    return Option(name, FLAG, help, short=short)


def argument(name: str, help: str, **more) -> Option:
    return Option(name, more.pop("kind", TEXT), help, required=True, **more)


def value(name: str, help: str, **more) -> Option:
    return Option(name, more.pop("kind", TEXT), help, **more)


def domain(help: str = "the domain's name, Id or UUID", complete: str = "domain") -> Option:
    return argument("domain", help, complete=complete)


class Verb:
    """`failure` stands before the reason when the daemon refuses; `exclusive` are pairs of options that cannot stand together."""
    __slots__ = ("exclusive", "failure", "help", "name", "options", "run", "text")

    def __init__(self, name: str, run: Run, help: str, options: tuple[Option, ...], text: str, failure: str,
                 exclusive: tuple[tuple[str, str], ...]):
        self.name, self.run, self.help, self.text, self.failure = name, run, help, text, failure
        self.options = {option.name: option for option in options}
        self.exclusive = exclusive


VERBS: dict[str, Verb] = {}                 # those of the modules that are imported; index.find brings any


def verb(name: str, help: str, *options: Option, text: str = "", failure: str = "",
         exclusive: tuple[tuple[str, str], ...] = ()) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        VERBS[name] = Verb(name, run, help, options, text, failure, exclusive)
        return run
    return register


class Given:
    """The options of one call as attributes: absent flags are False, values None, lists empty."""

    def __init__(self, values: dict[str, Any]):
        self.__dict__.update(values)

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...
