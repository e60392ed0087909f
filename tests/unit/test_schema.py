"""The table is whole and consistent, the typed classes follow it, and both are cheap to import."""
import subprocess
import sys

import pytest

from kvmapp import config, hostconfig, schema
from kvmapp.settings import slots

SECTIONS = [section for file in schema.FILES for section in (file.top, *file.sections.values())]
WHOLE = [config.DomainConfig, hostconfig.NetworkConfig, hostconfig.PoolConfig, hostconfig.DaemonConfig,
         hostconfig.GuestDefaults]
CLASSES = [cls for whole in WHOLE for cls in (whole, *whole.parts.values())]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.kind or "top")
def test_defaults_are_of_their_kind_and_help_is_a_sentence(section):
    assert section.help.endswith(".")
    for setting in (*section.settings.values(), *([section.word] if section.word else [])):
        assert setting.help.endswith("."), setting.key
        if setting.example:
            setting.kind.parse(setting.example)
        else:
            assert setting.default not in (None, [], ""), f"the samples have nothing to show for {setting.key}"
        assert not (setting.required and setting.default is not None), setting.key
        if setting.default not in (None, []):
            assert setting.kind.parse(setting.kind.format(setting.default)) == setting.default, setting.key
        if setting.option_value is not None:
            setting.kind.parse(setting.option_value)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_annotations_repeat_the_table(cls):
    bases = reversed(cls.__mro__)
    annotations = {name: text for base in bases for name, text in vars(base).get("__annotations__", {}).items()}
    for name in slots(cls.section):
        setting = cls.setting(name)
        python_type = setting.kind.python_type
        never_none = setting.required or setting.made or setting.default is not None
        kind = "list[str]" if python_type is list else python_type.__name__
        assert annotations[name] == (kind if never_none else f"{kind} | None"), f"{cls.__name__}.{name}"


def test_every_file_and_section_has_its_class():
    assert [cls.file for cls in WHOLE] == list(schema.FILES)
    for cls in WHOLE:
        assert {kind: part.section for kind, part in cls.parts.items()} == cls.file.sections


def test_options_do_not_clash():
    flags = [setting.option for section in SECTIONS for setting in section.settings.values() if setting.option]
    flags += [section.option for section in SECTIONS if section.option]
    assert len(flags) == len(set(flags))


HEAVY = {"argparse", "asyncio", "collections", "configobj", "dataclasses", "difflib", "enum", "inspect", "ipaddress",
         "json", "logging", "pathlib", "re", "socket", "subprocess", "tempfile", "typing", "uuid"}


@pytest.mark.parametrize("module", ["schema", "config", "options", "errors", "hostinfo", "foreground"])
def test_importing_brings_nothing_heavy(module):
    code = f"import sys; before = set(sys.modules); import kvmapp.{module}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
                          capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_options_alone_read_no_ini_machinery():
    code = ("import sys; from kvmapp.config import config_from_options as c; c([('--kernel', 'k'), ('--disk', 'd')]);"
            "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
                          capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
