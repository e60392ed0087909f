"""INI files: read with the line of every mistake, rewritten with the administrator's comments and order, saved
atomically.

The grammar is configobj's, without lists, interpolation and nested sections: `key = value`, `[heading]`, `# comment`;
quotes of either kind around a value that starts or ends with spaces or holds a `#`, triple quotes around one of
several lines. In one point it is stricter: a `#` glued to an unquoted value is refused, since configobj would cut the
value there without a word.
"""
from __future__ import annotations

import os

from kvmapp.errors import ConfigError
from kvmapp.values import WORD_CHARACTERS

FILE_LIMIT = 256 << 10
LINE_LIMIT = 8192                       # configobj's expressions take quadratic time on a line
TEMPORARY_PREFIX = ".kvmapp-tmp-"       # what a write that was killed may leave behind; never a *.conf

IniSections = dict[str, dict[str, str]]


def read_text(path: str) -> str:
    """The file's text; ConfigError for whatever is no text file of a sensible size."""
    try:
        # O_NONBLOCK: a FIFO in the place of a file must not stop the daemon.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            kind = os.fstat(fd).st_mode & 0o170000
            if kind != 0o100000:
                raise ConfigError(f"is {'a directory' if kind == 0o040000 else 'a device, FIFO or socket'}, not a file",
                                  file=path)
            data = os.read(fd, FILE_LIMIT + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"Cannot read the file: {error.strerror}", permission_hint(path, error), file=path) from None
    if len(data) > FILE_LIMIT:
        raise ConfigError(f"is larger than {FILE_LIMIT >> 10} KiB: no configuration file", file=path)
    return decode(data, path)


def permission_hint(path: str, error: OSError, bits: int = 4) -> str | None:
    if not isinstance(error, PermissionError):
        return None
    from kvmapp.hostinfo import why_no_access
    return why_no_access(path, bits)


def decode(data: bytes, path: str | None) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        line = data[:data.index(b"\0")].count(b"\n") + 1
        raise ConfigError("holds a NUL byte: this is no text file", file=path, line=line)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise ConfigError(f"byte {data[error.start]:#04x} is not UTF-8", "save the file as UTF-8",
                          file=path, line=line) from None


class Ini:
    """A parsed text. `sections` maps each heading ("" for the top) to its keys and their unquoted values."""

    def __init__(self, text: str, path: str | None = None):
        self.path = path
        self.lines = text.split("\n")
        for number, line in enumerate(self.lines, 1):
            if len(line) > LINE_LIMIT:
                raise ConfigError(f"the line is longer than {LINE_LIMIT} characters", file=path, line=number)
        self.tree = parse(self.lines, path)
        self.sections: IniSections = {"": self._values(self.tree)}
        for heading in self.tree.sections:
            section = self.tree[heading]
            if section.sections:
                inner = section.sections[0]
                raise ConfigError(f"[[{inner}]]: sections within sections are not used here", f"write [{inner}]",
                                  file=path, line=self.line_of(heading))
            normal = " ".join(heading.split())
            self._check_words(normal.split(), f"[{heading}] is no heading", heading, None)
            if normal in self.sections:
                raise ConfigError(f"[{normal}] stands here a second time", file=path, line=self.lines_of(heading)[-1])
            self.sections[normal] = self._values(section)

    def _values(self, section) -> dict[str, str]:
        for key in section.scalars:
            if not key.strip():
                raise ConfigError("a value stands here without its key", file=self.path,
                                  line=self.line_of(section.name or "", key))
            self._check_words([key], f"{key!r} is no key", section.name or "", key)
        return {key: unquote(section[key]) for key in section.scalars}

    def _check_words(self, words: list[str], complaint: str, heading: str, key: str | None) -> None:
        """Keys and headings are plain words, so that they never need quotes."""
        for word in words:
            if not WORD_CHARACTERS.issuperset(word):
                raise ConfigError(f"{complaint}: letters, digits, dots, dashes and underscores make one", file=self.path,
                                  line=self.line_of(heading, key))

    def line_of(self, heading: str, key: str | None = None) -> int | None:
        """The line of a heading, or of a key below it."""
        return next(iter(self.lines_of(heading, key)), None)

    def lines_of(self, heading: str, key: str | None = None) -> list[int]:
        """Looked for only when there is something to complain of: configobj does not keep lines."""
        wanted, current, closing = heading.split(), [], ""
        found = []
        for number, line in enumerate(self.lines, 1):
            if closing:                                     # within a triple-quoted value
                closing = "" if closing in line else closing
                continue
            if not line.strip() or line.lstrip()[0] == "#":
                continue
            marker = self.tree._sectionmarker.match(line)
            if marker:
                current = unquote(marker[3]).split()
                if current == wanted and key is None:
                    found.append(number)
                continue
            _, name, value = self.tree._keyword.match(line).groups()
            if current == wanted and unquote(name) == key:
                found.append(number)
            if value[:3] in ('"""', "'''") and value[:3] not in value[3:]:
                closing = value[:3]
        return found

    def set(self, heading: str, key: str, value: str, order: list[str]) -> None:
        """Sets a key; a new one goes behind the nearest of those that stand before it in `order`."""
        section = self._section(heading)
        if key in section.scalars:
            if unquote(section[key]) == value:
                return
            section[key] = quote(value)
            return
        section[key] = quote(value)
        before = [name for name in section.scalars[:-1] if name in order[:order.index(key)]]
        section.scalars.remove(key)
        section.scalars.insert(section.scalars.index(before[-1]) + 1 if before else 0, key)

    def remove(self, heading: str, key: str | None = None) -> None:
        if key is not None:
            section = self._section(heading)
            if key in section:
                del section[key]
        else:
            for name in [name for name in self.tree.sections if " ".join(name.split()) == heading]:
                del self.tree[name]

    def _section(self, heading: str):
        if not heading:
            return self.tree
        for name in self.tree.sections:
            if " ".join(name.split()) == heading:
                return self.tree[name]
        self.add(heading)
        return self.tree[heading]

    def add(self, heading: str) -> None:
        """An empty section at the end, if it is not there."""
        if all(" ".join(name.split()) != heading for name in self.tree.sections):
            self.tree[heading] = {}
            self.tree.comments[heading] = [""]

    def render(self) -> str:
        newline = self.tree.newlines or "\n"
        return newline.join(self.tree.write()) + newline


def parse(lines: list[str], path: str | None):
    """configobj's tree of the lines, its values still as they stand in the file; its complaint as a ConfigError."""
    from configobj import ConfigObjError

    from kvmapp.initree import IniTree
    text = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    try:
        return IniTree(text)
    except ConfigObjError as error:
        first = error.errors[0] if getattr(error, "errors", None) else error
        line = first.line_number
        words = str(first).partition(" at line ")[0]
        words, hint = COMPLAINTS.get(words.partition(" (")[0], (words, None))
        shown = lines[line - 1].strip() if line else ""
        raise ConfigError(f"{words}: {shown[:80]!r}", hint, file=path, line=line) from None


COMPLAINTS: dict[str, tuple[str, str | None]] = {
    "Invalid line": ("neither `key = value` nor a [heading]", None),
    "Parse error in value": ("the value's quotes or comment cannot be understood",
                             "put quotes around the whole value, and a space before the # of a comment"),
    "Parse error in multiline value": ("the value's triple quotes are not closed", None),
    "Duplicate keyword name": ("this key stands here a second time", None),
    "Duplicate section name": ("this section stands here a second time", None),
    "Cannot compute the section depth": ("the heading's brackets do not match", None),
    "Cannot compute nesting level": ("the heading's brackets do not match", None),
    "Section too nested": ("sections within sections are not used here", None),
}


def unquote(raw: str) -> str:
    for mark in ('"""', "'''", '"', "'"):
        if len(raw) >= 2 * len(mark) and raw.startswith(mark) and raw.endswith(mark):
            return raw[len(mark):-len(mark)]
    return raw


def quote(value: str) -> str:
    """The value as it must stand in a file to be read back as itself, by us and by configobj."""
    if "\n" not in value:
        if value and value == value.strip() and value[0] not in "\"'" and "#" not in value:
            return value
        for mark in ('"', "'"):
            if mark not in value:
                return mark + value + mark
    for mark in ('"""', "'''"):
        if mark not in value and not value.endswith(mark[0]):
            return mark + value + mark
    raise ConfigError(f"{value!r} cannot be written to an INI file: both kinds of quotes stand in it in the way",
                      "leave out one kind of quotes")


def write_atomically(path: str, text: str, mode: int = 0o600, *, before: str | None = None) -> None:
    """Either the whole new text stands in the file or the old one, whatever happens; mode and owner stay as they
    were. `before`: the text that the new one was made from; another one that stands there by now is left there.
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, TEMPORARY_PREFIX + os.urandom(6).hex())
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as stream:
                keep_mode_and_owner(fd, path, mode)
                stream.write(text.encode())
                stream.flush()
                os.fsync(fd)
            if before is not None and read_text(path) != before:
                raise ConfigError("was changed meanwhile: it is left as it is", "do it again", file=path)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(folder)
    except OSError as error:
        raise ConfigError(f"Cannot write the file: {error.strerror}", permission_hint(folder, error, 3), file=path) from None


def clear_leftovers(folder: str) -> None:
    """Removes what writers that were killed left behind; for the folder's one owner, who knows that no other writes now."""
    for name in os.listdir(folder):
        if name.startswith(TEMPORARY_PREFIX):
            os.unlink(os.path.join(folder, name))


def keep_mode_and_owner(fd: int, path: str, mode: int) -> None:
    try:
        old = os.stat(path)
    except FileNotFoundError:
        os.fchmod(fd, mode)
        return
    new = os.fstat(fd)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, old.st_mode & 0o7777)


def sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
