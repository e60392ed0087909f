"""A domain's file from outside: define, create, undefine, dumpconf, domrename, desc. The daemon checks every text before it saves."""
from __future__ import annotations

import os

from kvmapp.cli.table import argument, domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import ConfigError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.errors import KvmappError

FILE = argument("file", "a domain's INI file, see kvmapp-domain(5); - is standard input", complete="file")
VALIDATE = flag("validate", "check the file first (always done)")
LIMIT = 1 << 20                         # bytes; the daemon takes less
NONE_HERE = "accepted for virsh's sake: a domain of kvmapp has none"


@verb("define", "define a domain, or change it, from a file", FILE, VALIDATE, failure="Failed to define domain from {file}")
def define(session, given):
    defined = session.daemon.post("/v1/domains", text=read_text(given.file), file=path_of(given.file))
    session.done(defined, f"Domain {defined['domain']['name']} defined from {given.file}")
    if defined["made"]:
        session.note(f"made: {', '.join(defined['made'])}")


@verb("create", "start a domain from a file, without keeping the file", FILE,
      flag("console", "then attach to its console"), flag("paused", "make it, but do not let it run yet"), VALIDATE,
      text="A transient domain: when it ends it is gone.",
      failure="Failed to create domain from {file}")
def create(session, given):
    if given.console:
        from kvmapp.cli.console import require_terminal
        require_terminal()
    request = {"text": read_text(given.file), "file": path_of(given.file), "transient": True}
    with session.wait_with(f"starting the domain of {given.file}"):
        created = session.daemon.post("/v1/domains", **request, **({"paused": True} if given.paused else {}))
    session.done(created, f"Domain {created['domain']['name']} created from {given.file}")
    if given.console:
        from kvmapp.cli.lifecycle import open_after
        return open_after(session, created)
    return 0


def read_text(file: str) -> str:
    """Raises ConfigError, for what is plainly no INI file too."""
    try:
        fd = 0 if file == "-" else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", closefd=file != "-") as stream:
            data = stream.read(LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"Failed to open file '{file}': {error.strerror}") from None
    if len(data) > LIMIT or b"\0" in data:
        raise ConfigError(f"'{file}' is no text of a domain", "was an image meant for `disk`? see kvmapp-domain(5)")
    if data.lstrip()[:1] == b"<":
        raise ConfigError(f"'{file}' is XML; kvmapp's domains are INI files", "kvmapp-domain(5) has each key, and an example")
    return data.decode("utf-8", "surrogateescape")


def path_of(file: str) -> str | None:
    """Relative paths in a text belong to the folder of its file, or to ours when it has none."""
    return os.path.join(os.getcwd(), "stdin" if file == "-" else file)


@verb("undefine", "remove a domain's file; its disks stay", domain(),
      flag("remove-all-storage", "remove its disks, too (they cannot be brought back)"),
      value("storage", "remove these disks, by their targets or sources, with commas (see domblklist)", named=True, complete="disk"),
      flag("managed-save", "accepted for virsh's sake: its managed save always goes"),
      flag("snapshots-metadata", NONE_HERE), flag("checkpoints-metadata", NONE_HERE),
      flag("nvram", NONE_HERE), flag("keep-nvram", NONE_HERE), flag("tpm", NONE_HERE), flag("keep-tpm", NONE_HERE),
      text="Removes the domain's file, its autostart mark and its managed save, and says what is left. A running domain goes on, as a "
           "transient one.",
      failure="Failed to undefine domain '{domain}'", exclusive=(("remove-all-storage", "storage"),))
def undefine(session, given):
    storage = ",".join(disk_names(session, given)) if given.storage else None
    with session.wait_with(f"undefining {given.domain}", given.domain):
        undefined = session.daemon.delete(of(given.domain), remove_all_storage=given.remove_all_storage, storage=storage)
    lines = [f"Domain {undefined['name']} has been undefined"]
    lines += [f"removed: {what}" for what in undefined["removed"] if what] + [f"left: {what}" for what in undefined["left"]]
    if undefined["still_runs"]:
        lines.append("it still runs, and is gone when it ends")
    session.done(undefined, "\n".join(lines))


def disk_names(session, given) -> list[str]:
    """--storage may name a disk by its source, as in virsh; the daemon wants targets."""
    disks = config_of(session, given.domain, inactive=True)["disks"]
    names = []
    for word in given.storage.split(","):
        found = next((disk["name"] for disk in disks if word in (disk["name"], disk["source"])), None)
        if found is None:
            raise UsageError(f"Domain '{given.domain}' has no disk '{word}'",
                             f"it has {', '.join(disk['name'] for disk in disks) or 'none'}: see kvmappctl domblklist")
        names.append(found)
    return names


DUMP_INACTIVE = flag("inactive", "of a running domain: its file, which its next start will take")


@verb("dumpconf", "the configuration of a domain", domain(), DUMP_INACTIVE)
def dumpconf(session, given):
    config = session.daemon.get(of(given.domain, "config"), inactive=given.inactive)
    session.answer(config, config["text"])


@verb("dumpxml", "the same as dumpconf: an INI file, no XML", domain(), DUMP_INACTIVE,
      flag("security-info", "accepted for virsh's sake: a domain's file holds no secrets"),
      flag("migratable", "accepted for virsh's sake"), flag("update-cpu", "accepted for virsh's sake"))
def dumpxml(session, given):
    dumpconf(session, given)
    session.note("note: kvmapp's configuration is an INI file; dumpconf shows it too")


@verb("domrename", "give a domain that is shut off another name", domain(complete="inactive"),
      argument("new-name", "its new name"),
      failure="Failed to rename domain '{domain}'")
def domrename(session, given):
    session.done(session.daemon.post(of(given.domain, "rename"), name=given.new_name), "Domain successfully renamed")


@verb("desc", "show or change a domain's description or title", domain(),
      flag("live", "of the running domain"), flag("config", "of its file"),
      flag("current", "of the running domain if it runs, else of its file"),
      flag("title", "the title, not the description"), flag("edit", "change it in an editor"),
      value("new-desc", "the new text; an empty one removes it", many=True),
      failure="Failed to change the description of domain '{domain}'",
      exclusive=(("live", "current"), ("config", "current")))
def desc(session, given):
    what = "title" if given.title else "description"
    if not (given.new_desc or given.edit):
        text = described(session, given, what)
        session.answer({what: text or None}, text or f"No {what} for domain: {given.domain}")
        return

    def save(text: str) -> dict:
        return session.daemon.post(of(given.domain, "description"), **{what: text or None, **scope(given)})
    if given.edit:
        from kvmapp.cli.editing import edit_text
        changed = edit_text(described(session, given, what), given.domain, lambda text: save(text.strip("\n")))
    else:
        changed = save(" ".join(given.new_desc))
    session.done(changed, f"Domain {what} updated successfully")


def described(session, given, what: str) -> str:
    return config_of(session, given.domain, inactive=given.config and not given.live)[what] or ""


def config_of(session, name: str, *, inactive: bool) -> dict:
    """The settings, as DomainConfig.to_dict gives them. Raises ConfigError where the file cannot be used."""
    config = session.daemon.get(of(name, "config"), inactive=inactive)["config"]
    if not config:
        raise ConfigError(f"The file of domain '{name}' cannot be used", "kvmappctl list --all says why; kvmappctl edit mends it")
    return config


def scope(given) -> dict[str, bool]:
    """--live and --config as the daemon has them; neither is --current."""
    return {key: True for key in ("live", "config") if getattr(given, key)}


def kept_at(error: KvmappError, path: str) -> KvmappError:
    """The error with the place of the text that was not taken."""
    error.hint = f"{error.hint}; your text is kept in {path}" if error.hint else f"your text is kept in {path}"
    return error
