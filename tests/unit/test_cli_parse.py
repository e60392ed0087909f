"""Words to verbs and options: what virsh takes is taken, what it refuses is refused in its words."""
import pytest

from kvmapp.cli import parse
from kvmapp.cli.index import GROUPS, HIDDEN, MODULES, find
from kvmapp.cli.parse import part_string
from kvmapp.cli.table import FLAG, VERBS
from kvmapp.errors import UsageError


def given(text):
    [(verb, options)] = parse.parse_string(text)
    return verb.name, {key: value for key, value in vars(options).items() if value not in (None, False, [])}


@pytest.mark.parametrize(("text", "expected"), [
    ("list --all", ("list", {"all": True})),
    ("start linuxvm02 --paused", ("start", {"domain": "linuxvm02", "paused": True})),
    ("start --paused linuxvm02", ("start", {"domain": "linuxvm02", "paused": True})),
    ("start --domain linuxvm02", ("start", {"domain": "linuxvm02"})),
    ("start --domain=linuxvm02", ("start", {"domain": "linuxvm02"})),
    ("start -- --paused", ("start", {"domain": "--paused"})),
    ("shutdown x acpi", ("shutdown", {"domain": "x", "mode": "acpi"})),
    ("setmem x 1024", ("setmem", {"domain": "x", "size": 1 << 20})),
    ("setmem --size 1G --domain x --live", ("setmem", {"domain": "x", "size": 1 << 30, "live": True})),
    ("setmem x 2MB", ("setmem", {"domain": "x", "size": 2_000_000})),
    ("domstats a b --vcpu", ("domstats", {"domain": ["a", "b"], "vcpu": True})),
    ("desc x --new-desc one two", ("desc", {"domain": "x", "new_desc": ["one", "two"]})),
    ("desc x --title one two", ("desc", {"domain": "x", "title": True, "new_desc": ["one", "two"]})),
    ("top -d 5 -b", ("top", {"delay": 5, "batch": True})),
    ("list --json", ("list", {"json": True})),
    ("echo -x", ("echo", {"string": ["-x"]})),
    ("list --help", ("help", {"command": "list"})),
    ("echo -- --help", ("echo", {"string": ["--help"]})),
])
def test_options(text, expected):
    assert given(text) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("nosuch", "unknown command: 'nosuch'"), ("install --name web", "kvmapp has no 'install' yet"),
    ("vol-list default", "kvmapp has no 'vol-list' yet"),
    ("list --foo", "command 'list' doesn't support option --foo"),
    ("list extra", "unexpected data 'extra'"),
    ("start", "command 'start' requires <domain> option"),
    ("setmem x", "command 'setmem' requires --size option"),
    ("list --all=3", "invalid '=' after option --all"),
    ("list --all --all", "option --all already seen"),
    ("dominfo --domain a b", "unexpected data 'b'"),
    ("dominfo --domain a --domain b", "option --domain already seen"),
    ("start --domain", "expected syntax: --domain <string>"),
    ("setmem x foo", "Scaled numeric value 'foo' for <size> option is malformed or out of range"),
    ("setmem x 99999999999999999999", "Scaled numeric value '99999999999999999999' for <size> option is malformed or out of range"),
    ("setvcpus x foo", "Numeric value 'foo' for <count> option is malformed or out of range"),
    ("setvcpus x -1", "Numeric value '-1' for <count> option is malformed or out of range"),
    ("setvcpus x \N{SUPERSCRIPT TWO}", "Numeric value '\N{SUPERSCRIPT TWO}' for <count> option is malformed or out of range"),
    ("event --all --timeout 0", "Numeric value '0' for <timeout> option is malformed or out of range"),
    ("event --all --timeout 2147484", "Numeric value '2147484' for <timeout> option is malformed or out of range"),
    ("top --delay 9999999999999999", "Numeric value '9999999999999999' for <delay> option is malformed or out of range"),
    ("start ''", "Failed to get option 'domain': Option argument is empty"),
    ("list --table --name", "Options --table and --name are mutually exclusive"),
    ("list; nosuch", "unknown command: 'nosuch'"),
    ("echo \"a", 'missing "'),
    ("echo 'a", "missing '"),
    ("echo a\\", "dangling \\"),
])
def test_refusals(text, message):
    with pytest.raises(UsageError) as caught:
        parse.parse_string(text)
    assert str(caught.value) == message


def test_refusals_name_what_was_meant():
    for text, hint in (("lst", "did you mean list?"), ("list --al", "did you mean --all?")):
        with pytest.raises(UsageError) as caught:
            parse.parse_string(text)
        assert caught.value.hint == hint


@pytest.mark.parametrize(("text", "commands"), [
    ("", []), ("  ;; \n", []), ("# only a comment", []),
    ("list", [["list"]]), ("  list   --all ", [["list", "--all"]]), ("list --all;", [["list", "--all"]]),
    ("list; dominfo x\nhostname", [["list"], ["dominfo", "x"], ["hostname"]]),
    ("echo a#b #c; echo d\necho e", [["echo", "a#b"], ["echo", "e"]]),
    ("echo 'a b' \"c d\" e\\ f", [["echo", "a b", "c d", "e f"]]),
    ("echo 'a\\b' \"c\\\"d\" e\"f\"g ''", [["echo", "a\\b", "c\"d", "efg", ""]]),
    ("echo 'x;y'", [["echo", "x;y"]]),
    ("dominfo 虚拟机", [["dominfo", "虚拟机"]]),
])
def test_strings_of_commands(text, commands):
    assert part_string(text) == commands


def test_index_is_what_the_modules_say():
    for name in MODULES:
        find(name)
    by_module: dict[str, set[str]] = {}
    for name, verb in VERBS.items():
        by_module.setdefault(verb.run.__module__.rpartition(".")[2], set()).add(name)
    listed: dict[str, set[str]] = {}
    for _, modules in GROUPS.values():
        for module, names in modules.items():
            listed.setdefault(module, set()).update(names)
    for name, module in HIDDEN.items():
        listed.setdefault(module, set()).add(name)
    assert by_module == listed


@pytest.mark.parametrize("name", sorted(MODULES))
def test_table_is_sound(name):
    verb = find(name)
    assert verb and verb.help and not verb.help.endswith(".")
    order = [option for option in verb.options.values() if option.kind != FLAG]
    assert not any(option.many for option in order[:-1] if not option.named), "nothing may follow what takes all words"
    required = [option.required for option in order]
    assert required == sorted(required, reverse=True), "what is required comes first"
    assert "json" not in verb.options and "help" not in verb.options
    for pair in verb.exclusive:
        assert set(pair) <= set(verb.options)
    if verb.failure:
        assert verb.failure.format_map({option.key: "x" for option in verb.options.values()})
