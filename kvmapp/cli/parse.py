"""Words to verbs and their options, as virsh reads them (its vsh.c is the specification; messages are the same words).

    parse_words(["start", "--paused", "linuxvm02"])  → [(Verb, Given)]
    parse_string("list --all; dominfo x")            → two of them

`--name VALUE` and `--name=VALUE` are the same; data without a name goes to the first option that wants one; `--` ends the options.
Everything is read before anything runs. Left out: single letters for options of verbs, where virsh has none either (top has).
"""
from __future__ import annotations

from kvmapp.cli.index import MODULES, find
from kvmapp.cli.table import FLAG, METAVARS, NUMBER, SECONDS, SIZE, Given, Option, Verb
from kvmapp.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Call = tuple[Verb, Given]

NUMBER_LIMIT = 1 << 63
NOT_YET = ("install", "img", "migrate", "pool-", "vol-", "snapshot-", "screenshot", "vncdisplay")       # what users look for
SECONDS_MOST = ((1 << 31) - 1) // 1000      # virsh counts its timeouts in milliseconds, in an int; what waits here cannot do with more


def parse_words(words: list[str]) -> list[Call]:
    """One call: a verb and its words as a shell has parted them."""
    return [parse_call(words)]


def parse_string(text: str) -> list[Call]:
    """Several calls in one string, parted by `;` and ends of lines."""
    return [parse_call(words) for words in part_string(text)]


def parse_call(words: list[str]) -> Call:
    name, *rest = words
    verb = find(name)
    if verb is None:
        if name.startswith(NOT_YET):
            raise UsageError(f"kvmapp has no '{name}' yet", "what this version does: kvmappctl help; what it does not: its README")
        raise UsageError(f"unknown command: '{name}'", nearest_hint(name, list(MODULES), "kvmappctl help lists the commands"))
    if asks_for_help(rest):
        help_verb = find("help")
        assert help_verb
        return help_verb, Given({"command": name, "json": "--json" in rest})
    return verb, Given(parse_options(verb, rest))


def asks_for_help(words: list[str]) -> bool:
    return "--help" in (words[:words.index("--")] if "--" in words else words)


class Reading:
    """What was read of one verb's options so far."""

    def __init__(self, verb: Verb):
        self.verb = verb
        self.values: dict[str, Any] = {option.key: [] if option.many else False if option.kind == FLAG else None
                                       for option in verb.options.values()}
        self.values["json"] = False
        self.waiting = [option for option in verb.options.values() if option.kind != FLAG and not option.named]
        self.seen: set[str] = set()

    def take(self, option: Option, text: str) -> None:
        self.seen.add(option.name)
        if option in self.waiting and not option.many:
            self.waiting.remove(option)
        if option.many:
            self.values[option.key].append(text)
        else:
            self.values[option.key] = converted(option, text)

    def take_data(self, text: str) -> None:
        if not self.waiting:
            raise UsageError(f"unexpected data '{text}'")
        self.take(self.waiting[0], text)

    def take_flag(self, option: Option) -> None:
        self.seen.add(option.name)
        self.values[option.key] = True


def parse_options(verb: Verb, words: list[str]) -> dict[str, Any]:
    reading = Reading(verb)
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            for data in remaining:
                reading.take_data(data)
        elif word.startswith("--"):
            read_option(reading, word, remaining)
        elif option := short_option(verb, word):
            if option.kind == FLAG:
                reading.take_flag(option)
            else:
                reading.take(option, next_word(option, remaining))
        else:
            reading.take_data(word)
    check(reading)
    return reading.values


def read_option(reading: Reading, word: str, remaining) -> None:
    name, equals, text = word[2:].partition("=")
    if name == "json":
        reading.values["json"] = True
        return
    option = reading.verb.options.get(name)
    if option is None:
        known = [f"--{one}" for one in (*reading.verb.options, "json", "help")]
        raise UsageError(f"command '{reading.verb.name}' doesn't support option --{name}", nearest_hint(f"--{name}", known))
    if name in reading.seen and not option.many:
        raise UsageError(f"option --{name} already seen")
    if option.kind != FLAG:
        reading.take(option, text if equals else next_word(option, remaining))
    elif equals:
        raise UsageError(f"invalid '=' after option --{name}")
    else:
        reading.take_flag(option)


def short_option(verb: Verb, word: str) -> Option | None:
    if len(word) != 2 or word[0] != "-":
        return None
    return next((option for option in verb.options.values() if option.short == word[1]), None)


def next_word(option: Option, remaining) -> str:
    for word in remaining:
        return word
    raise UsageError(f"expected syntax: --{option.name} <{METAVARS[option.kind]}>")


def check(reading: Reading) -> None:
    verb, seen = reading.verb, reading.seen
    for option in verb.options.values():
        if option.required and option.name not in seen:
            raise UsageError(f"command '{verb.name}' requires {f'<{option.name}>' if option.is_data else f'--{option.name}'} option",
                             f"kvmappctl help {verb.name} tells how to write it")
    for one, other in verb.exclusive:
        if one in seen and other in seen:
            raise UsageError(f"Options --{one} and --{other} are mutually exclusive")


def converted(option: Option, text: str) -> Any:
    """The text as the kind that the option wants."""
    if option.kind == SIZE:
        return size(option, text)
    if option.kind in (NUMBER, SECONDS):
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else NUMBER_LIMIT
        if number >= NUMBER_LIMIT or (option.kind == SECONDS and not 0 < number <= SECONDS_MOST):
            raise UsageError(f"Numeric value '{text}' for <{option.name}> option is malformed or out of range")
        return number
    if option.required and not text:
        raise UsageError(f"Failed to get option '{option.name}': Option argument is empty")
    if option.choices and text not in option.choices:
        raise UsageError(f"Unknown {option.name} '{text}'", f"it may be {', '.join(option.choices)}")
    return text


def size(option: Option, text: str) -> int:
    """A scaled integer as in virsh: a bare number is in KiB; 1G and 1GiB count in 1024s, 1GB in 1000s."""
    from kvmapp.values import KIB, Size, scaled
    try:
        amount = scaled(text, Size.units, KIB, "")
    except ValueError:
        amount = NUMBER_LIMIT
    if amount >= NUMBER_LIMIT:
        raise UsageError(f"Scaled numeric value '{text}' for <{option.name}> option is malformed or out of range",
                         "a number of KiB, or one with its unit: 512M, 2GiB")
    return amount


def nearest_hint(word: str, known: list[str], otherwise: str | None = None) -> str | None:
    from kvmapp.settings import nearest_of
    nearest = nearest_of(word, known)
    return f"did you mean {nearest}?" if nearest else otherwise


# A string of commands: quotes of both kinds, backslash, `;` or an end of line between commands, # for comments.

PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/:=,@%+ ")


def part_string(text: str) -> list[list[str]]:
    if PLAIN.issuperset(text):
        return [text.split()] if text.strip() else []
    return Parting(text).commands()


class Parting:
    def __init__(self, text: str):
        self.letters = iter(text)
        self.done: list[list[str]] = []
        self.words: list[str] = []
        self.word: list[str] | None = None      # None: between words; an empty one may be quotes around nothing

    def commands(self) -> list[list[str]]:
        for letter in self.letters:
            if letter in ";\n":
                self.end_command()
            elif letter in " \t\r":
                self.end_word()
            elif letter == "#" and self.word is None:
                self.skip_comment()
            else:
                self.add(letter)
        self.end_command()
        return self.done

    def add(self, letter: str) -> None:
        if self.word is None:
            self.word = []
        if letter == "\\":
            letter = next(self.letters, "")
            if not letter:
                raise UsageError("dangling \\")
            self.word.append(letter)
        elif letter in "'\"":
            self.add_quoted(letter)
        else:
            self.word.append(letter)

    def add_quoted(self, quote: str) -> None:
        assert self.word is not None
        for letter in self.letters:
            if letter == quote:
                return
            if letter == "\\" and quote == '"':
                letter = next(self.letters, "")
            self.word.append(letter)
        raise UsageError("missing " + quote)

    def skip_comment(self) -> None:
        for letter in self.letters:
            if letter == "\n":
                self.end_command()
                return

    def end_word(self) -> None:
        if self.word is not None:
            self.words.append("".join(self.word))
            self.word = None

    def end_command(self) -> None:
        self.end_word()
        if self.words:
            self.done.append(self.words)
            self.words = []
