"""The machinery between schema.py's table and typed objects: one way in for files, options and JSON, one way out.

Whatever comes in is first `IniSections`, heading → key → text, so that every source is checked by the same rules in
the same words. `Origin` knows where the text came from and turns a complaint into an error with file and line or with
the option's name.
"""
from __future__ import annotations

import os

from kvmapp import __version__, schema
from kvmapp.errors import ConfigError
from kvmapp.values import Choice, Mac, Path, make_mac, make_uuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ClassVar, NoReturn, Self, TypeVar

    from kvmapp.ini import Ini, IniSections

    Config = TypeVar("Config", bound="FileConfig")


def slots(section: schema.Section) -> tuple[str, ...]:
    return (*((section.word.key,) if section.word else ()), *section.settings)


class Settings:
    """One section's settings as attributes, at their defaults unless given."""
    __slots__ = ()
    section: schema.Section

    def __init__(self, **values: object):
        for name in slots(self.section):
            default = self.setting(name).default
            setattr(self, name, values.pop(name, list(default) if isinstance(default, list) else default))
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    @classmethod
    def setting(cls, name: str) -> schema.Setting:
        if cls.section.word and name == cls.section.word.key:
            return cls.section.word
        return cls.section.settings[name]

    @property
    def heading(self) -> str:
        word = self.section.word
        return f"{self.section.kind} {word.kind.format(getattr(self, word.key))}" if word else self.section.kind

    def to_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in slots(self.section)}

    def changes(self) -> dict[str, object]:
        """As to_dict, without what is at its default: an older version may not know of it."""
        word = self.section.word
        return {name: value for name, value in self.to_dict().items()
                if (word and name == word.key) or value != self.setting(name).default}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None                                             # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"


class FileConfig(Settings):
    """A whole file: the top's settings, and each section under its attribute (a list, an object, or None)."""
    __slots__ = ("filename", "made", "warnings")
    file: schema.File
    parts: ClassVar[dict[str, type[Settings]]]
    filename: str | None                    # the file it was read from
    made: tuple[str, ...]                   # what was absent and made: the file wants to be written
    warnings: tuple[str, ...]               # what is understood but not honoured by this version

    def __init__(self, **values: object):
        self.filename, self.made, self.warnings = None, (), ()
        for kind, section in self.file.sections.items():
            absent: object = [] if section.word else self.parts[kind]() if section.always else None
            setattr(self, section.attribute, values.pop(section.attribute, absent))
        super().__init__(**values)

    def all_parts(self) -> list[Settings]:
        found: list[Settings] = []
        for section in self.file.sections.values():
            part = getattr(self, section.attribute)
            found += part if section.word else [part] if part is not None else []
        return found

    def to_dict(self) -> dict[str, object]:
        data = super().to_dict()
        for section in self.file.sections.values():
            part = getattr(self, section.attribute)
            data[section.attribute] = [one.to_dict() for one in part] if section.word else part and part.to_dict()
        return data

    def changes(self) -> dict[str, object]:
        data = {name: value for name, value in super().to_dict().items() if value != self.setting(name).default}
        for section in self.file.sections.values():
            part = getattr(self, section.attribute)
            value = [one.changes() for one in part] if section.word else part and part.changes()
            if value or (value is not None and not section.word and not section.always):
                data[section.attribute] = value
        return data

    @classmethod
    def from_dict(cls, data: dict) -> Self:
        """Checks what to_dict gave, or what a client sent, as strictly as a file."""
        origin = Origin()
        sections: IniSections = {"": {}}
        attributes = {section.attribute: section for section in cls.file.sections.values()}
        for name, value in data.items():
            section = attributes.get(name)
            if section is None:
                add_texts(sections[""], cls.file.top, "", {name: value}, origin)
                continue
            if value is None and not section.word:
                continue
            for one in value if isinstance(value, list) and section.word else [value]:
                if not isinstance(one, dict):
                    raise ConfigError(f"{name} = {one!r}: expected an object with the settings of [{section.kind}]")
                word = section.word
                heading = f"{section.kind} {one.get(word.key)}" if word else section.kind
                if heading in sections:
                    raise ConfigError(f"[{heading}] stands here a second time")
                rest = {key: part for key, part in one.items() if word is None or key != word.key}
                add_texts(sections.setdefault(heading, {}), section, heading, rest, origin)
        return build(cls, sections, origin)


def add_texts(texts: dict[str, str], section: schema.Section, heading: str, values: dict, origin: Origin) -> None:
    """Typed values as the text of a file; a value of another type is an error, never converted."""
    for key, value in values.items():
        setting = section.settings.get(key)
        if value is None and setting is not None:
            continue
        if setting is not None and type(value) is not setting.kind.python_type:
            origin.fail(heading, key, f"{value!r}: expected {setting.kind.describe()}")
        texts[key] = setting.kind.format(value) if setting else str(value)


class Origin:
    """Where the text came from: a parsed file, options (`flags`: heading and key to the option), or neither (JSON)."""

    def __init__(self, ini: Ini | None = None, flags: dict[tuple[str, str], str] | None = None):
        self.ini = ini
        self.flags = flags or {}

    def fail(self, heading: str, key: str | None, complaint: str, hint: str | None = None) -> NoReturn:
        """`complaint` follows the key: `= 'x': expected y`; without a key it follows the heading."""
        flag = self.flags.get((heading, key or ""))
        if flag is not None:
            option, _, suboption = flag.partition(" ")
            if suboption or key is None:
                option = f"{option}: {key} =" if key else f"{option}: [{heading}]"
            raise ConfigError(f"{option} {complaint}", hint)
        where = f"[{heading}] " if heading else ""
        message = f"{where}{key} = {complaint}" if key else f"{where}{complaint}"
        if self.ini is None:
            raise ConfigError(message, hint)
        raise ConfigError(message, hint, file=self.ini.path, line=self.ini.line_of(heading, key))


def build(cls: type[Config], sections: IniSections, origin: Origin, folder: str | None = None) -> Config:
    """Text to a checked object of `cls`, a FileConfig. Relative paths belong to `folder`."""
    file = cls.file
    warnings: list[str] = []
    lists: dict[str, list[Settings]] = {}
    values: dict[str, object] = read_section(file, file.top, "", sections.get("", {}), origin, folder, warnings)
    for heading, texts in sections.items():
        if not heading:
            continue
        kind, _, word_text = heading.partition(" ")
        section = file.sections.get(kind)
        if section is None:
            nearest = nearest_of(kind, list(file.sections))
            known = [f"[{nearest}]"] if nearest else [one.shape for one in file.sections.values()]
            origin.fail(heading, None, "is no section of this kind of file",
                        f"did you mean {known[0]}?" if nearest else f"known here: {', '.join(known)}")
        word = read_word(section, heading, word_text, origin)
        settings = read_section(file, section, heading, texts, origin, folder, warnings)
        if section.word is None:
            values[section.attribute] = cls.parts[kind](**settings)
            continue
        if any(getattr(one, section.word.key) == word for one in lists.setdefault(section.attribute, [])):
            origin.fail(heading, None, "stands here a second time")
        lists[section.attribute].append(cls.parts[kind](**{section.word.key: word}, **settings))
    for attribute, parts in lists.items():
        values[attribute] = sorted(parts, key=place)
    config = cls(**values)
    config.warnings = tuple(warnings)
    return config


def place(part: Settings) -> tuple[int, object]:
    """The order of a section's parts: numbers by value, names as vda ... vdz, vdaa."""
    word = getattr(part, part.section.word.key) if part.section.word else ""
    return (0, word) if isinstance(word, int) else (len(word), word)


def read_word(section: schema.Section, heading: str, text: str, origin: Origin):
    if section.word is None:
        if text:
            origin.fail(heading, None, f"takes no word: write [{section.kind}]")
        return None
    if not text:
        origin.fail(heading, None, f"wants a word behind it: {section.word.kind.describe()}")
    try:
        return section.word.kind.parse(text)
    except ValueError as error:
        origin.fail(heading, None, f"is no heading: expected {section.shape}, {error}")


def read_section(file: schema.File, section: schema.Section, heading: str, texts: dict[str, str], origin: Origin,
                 folder: str | None, warnings: list[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    if is_ahead(section.since):
        warnings.append(f"[{heading}] is honoured from version {section.since} on; this is {__version__}")
    for key, text in texts.items():
        setting = section.settings.get(key)
        if setting is None:
            origin.fail(heading, key, f"{text!r}: unknown key", where_it_belongs(file, section, key))
        try:
            value = setting.kind.parse(text)
        except ValueError as error:
            got = f"{text!r}" if len(text) <= 80 else f"{text[:80]!r}..."
            origin.fail(heading, key, f"{got}: expected {error}", nearest_choice(setting, text))
        if isinstance(setting.kind, Path):
            value = os.path.normpath(os.path.join(folder or "/", value))
        if is_ahead(setting.since) or is_ahead(section.since):
            since = max(setting.since, section.since, key=schema.version_key)
            if value != setting.default:
                origin.fail(heading, key, f"{text!r} is honoured from version {since} on; this is {__version__}")
            if not is_ahead(section.since):
                warnings.append(f"{key} is honoured from version {since} on; this is {__version__}")
        values[key] = value
    for setting in section.settings.values():
        if setting.required and setting.key not in values:
            origin.fail(heading, None, f"{setting.key} is missing" if heading else f"'{setting.key}' is missing",
                        f"{setting.key} = ... : {setting.help}")
    return values


def is_ahead(since: str) -> bool:
    return schema.version_key(since) > schema.version_key(__version__)


def nearest_of(word: str, known: list[str]) -> str | None:
    from difflib import get_close_matches
    found = get_close_matches(word[:64], known, 1)
    return found[0] if found else None


def nearest_choice(setting: schema.Setting, text: str) -> str | None:
    nearest = nearest_of(text.lower(), list(setting.kind.choices)) if isinstance(setting.kind, Choice) else None
    return f"did you mean {nearest}?" if nearest else None


def where_it_belongs(file: schema.File, section: schema.Section, key: str) -> str:
    nearest = nearest_of(key, list(section.settings))
    if nearest:
        return f"did you mean {nearest}?"
    for other in (file.top, *file.sections.values()):
        if key in other.settings:
            return f"{key} belongs {f'into {other.shape}' if other.kind else 'to the top, before the first heading'}"
    return f"known here: {', '.join(section.settings) or 'nothing'}"


def complete(config: FileConfig, without: tuple[str, ...] = ()) -> None:
    """Makes what is made once: the UUID and MAC addresses that are absent, `without` these. `config.made` says what."""
    taken = {getattr(part, key) for part in (config, *config.all_parts())
             for key, setting in part.section.settings.items() if isinstance(setting.kind, Mac)}
    for part in (config, *config.all_parts()):
        for key, setting in part.section.settings.items():
            if not setting.made or key in without or getattr(part, key) is not None:
                continue
            value = make_mac() if isinstance(setting.kind, Mac) else make_uuid()
            while value in taken:
                value = make_mac()
            taken.add(value)
            setattr(part, key, value)
            config.made += (f"[{part.heading}] {key}" if part is not config else key,)


def read_file(cls: type[Config], path: str, text: str | None = None) -> tuple[Config, Ini]:
    """The file at `path` as a checked object of `cls`; with `text`, that text as if it stood there."""
    from kvmapp.ini import Ini, read_text
    path = os.path.abspath(path)
    ini = Ini(read_text(path) if text is None else text, path)
    config = build(cls, ini.sections, Origin(ini), os.path.dirname(path))
    config.filename = path
    return config, ini


def write_file(path: str, config: FileConfig, check: Callable[[str], FileConfig]) -> None:
    """Rewrites what differs from the file, or makes the file; `check(text)` must give an equal object before it is
    saved.
    """
    from kvmapp.ini import Ini, read_text, write_atomically
    path = os.path.abspath(path)
    before = read_text(path) if os.path.lexists(path) else None
    ini = Ini(before or "", path)
    apply(ini, config, os.path.dirname(path))
    text = ini.render()
    if check(text) != config:
        raise ConfigError("the file as it would be written reads back differently; it was left as it is", file=path)
    write_atomically(path, text, before=before)


def apply(ini: Ini, config: FileConfig, folder: str) -> None:
    """Changes the parsed file where it says something else than the object."""
    headings = {heading_key(config.file, heading): heading for heading in ini.sections}
    kept = {""}
    for part in (config, *config.all_parts()):
        heading = headings.get(heading_key(config.file, part.heading))
        if heading is None:
            heading = part.heading
            if part.section.always and part == type(part)():
                continue
            ini.add(heading)
        kept.add(heading)
        apply_section(ini, heading, part, folder)
    for heading in ini.sections:
        if heading not in kept:
            ini.remove(heading)


def heading_key(file: schema.File, heading: str) -> tuple[str, object]:
    """What makes two headings the same: [serial 00] is [serial 0]."""
    kind, _, text = heading.partition(" ")
    section = file.sections.get(kind)
    try:
        return kind, section.word.kind.parse(text) if section and section.word else text
    except ValueError:
        return kind, text


def apply_section(ini: Ini, heading: str, part: Settings, folder: str) -> None:
    texts = ini.sections.get(heading, {})
    order = list(part.section.settings)
    for key, setting in part.section.settings.items():
        value = getattr(part, key)
        if value is None or value == []:
            if key in texts:
                ini.remove(heading, key)
        elif key in texts:
            if parsed(setting, texts[key], folder) != value:
                ini.set(heading, key, setting.kind.format(value), order)
        elif value != setting.default or setting.shown:
            ini.set(heading, key, setting.kind.format(value), order)
    for key in texts:
        if key not in part.section.settings:
            ini.remove(heading, key)


def parsed(setting: schema.Setting, text: str, folder: str):
    try:
        value = setting.kind.parse(text)
    except ValueError:
        return None
    return os.path.normpath(os.path.join(folder, value)) if isinstance(setting.kind, Path) else value
