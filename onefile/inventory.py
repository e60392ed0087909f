"""What is inside, with versions and licences: a CycloneDX 1.5 list (cyclonedx.org), and the licences' own texts.

Whose a file is, the host's package database and Python's metadata tell. Nothing in it depends on when or where it was made.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

OURS = "kvmapp"
UNKNOWN = "unknown"


@dataclass
class Part:
    name: str
    version: str
    licence: str
    kind: str = "library"
    texts: list[Path] = field(default_factory=list)


def collect(work: Path, version: str, libraries: dict[str, Path], linked: list[Path]) -> list[Part]:
    """`work` is PyInstaller's folder of notes, `libraries` and `linked` are files of the host that went in as they are, or by ld."""
    collected = {Path(source) for target, source, kind in table(work / "COLLECT-00.toc") if kind in ("BINARY", "EXTENSION")}
    modules = {target.split("/")[0].split(".")[0] for target, _, _ in table(work / "COLLECT-00.toc")}
    parts = [Part(OURS, version, "GPL-2.0-or-later", "application", [Path("COPYING")]), python()]
    parts += distributions(modules)
    site = Path(sysconfig.get_path("platlib"))
    standard = Path(sys.base_prefix).resolve()
    files = [path.resolve() for path in [*collected, *libraries.values(), *linked]]
    foreign = sorted({path for path in files if not path.is_relative_to(site.resolve()) and not path.is_relative_to(Path.cwd())
                      and not (path.is_relative_to(standard) and standard != Path("/usr"))})
    parts += packages(foreign)
    unique = {part.name: part for part in parts}
    return [unique[OURS], *sorted((part for part in unique.values() if part.name != OURS), key=lambda part: part.name.lower())]


def table(path: Path) -> list[tuple[str, str, str]]:
    """The list that PyInstaller notes as a Python literal."""
    noted = ast.literal_eval(path.read_text())
    return next(one for one in noted if isinstance(one, list) and one and isinstance(one[0], tuple))


def python() -> Part:
    texts = [Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", Path(f"/usr/share/doc/python3.{sys.version_info.minor}/copyright")]
    return Part("CPython", ".".join(map(str, sys.version_info[:3])), "PSF-2.0", texts=[path for path in texts if path.exists()][:1])


def distributions(modules: set[str]) -> list[Part]:
    """The Python packages that these top-level modules belong to, and PyInstaller, whose bootloader is inside."""
    owners = metadata.packages_distributions()
    names = {name for module in modules for name in owners.get(module, ())} | {"pyinstaller"}
    return [distribution(metadata.distribution(name)) for name in sorted(names - {OURS})]


def distribution(one: metadata.Distribution) -> Part:
    told = one.metadata
    licence = next((told[name] for name in ("License-Expression", "License") if name in told), "")
    if not licence or "\n" in licence:
        classes = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier") or () if line.startswith("License ::")]
        licence = ", ".join(classes) or UNKNOWN
    texts = sorted(Path(str(one.locate_file(file))) for file in one.files or ()
                   if re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name, re.IGNORECASE) and ".dist-info" in str(file))
    return Part(told["Name"], told["Version"], licence.strip(), texts=[path for path in texts if path.exists()])


def packages(files: list[Path]) -> list[Part]:
    """Of the host's package database: dpkg, else rpm."""
    if shutil.which("dpkg-query"):
        return deb_packages(files)
    parts = {}
    for path in files:
        told = subprocess.run(["rpm", "-qf", "--qf", "%{NAME}\t%{VERSION}-%{RELEASE}\t%{LICENSE}\n", path], capture_output=True,
                              text=True, check=False).stdout.splitlines()
        name, version, licence = told[0].split("\t") if told and told[0].count("\t") == 2 else (path.name, UNKNOWN, UNKNOWN)
        parts[name] = Part(name, version, licence)
    return list(parts.values())


def deb_packages(files: list[Path]) -> list[Part]:
    parts = {}
    for path in files:
        name, version = deb_owner(path)
        text = Path(f"/usr/share/doc/{name}/copyright")
        words = text.read_text(errors="replace") if text.exists() else ""
        licences = dict.fromkeys(re.findall(r"^License:\s*(\S.*)$", words, re.MULTILINE))
        parts[name] = Part(name, version, ", ".join(licences) or named_in(words), texts=[text] if words else [])
    return list(parts.values())


def deb_owner(path: Path) -> tuple[str, str]:
    """By the names under which the file may be noted: with and without /usr."""
    for name in (str(path), str(path).removeprefix("/usr")):
        found = subprocess.run(["dpkg-query", "-S", name], capture_output=True, text=True, check=False).stdout
        if found:
            package = found.split(":")[0].split(",")[0]
            version = subprocess.run(["dpkg-query", "-W", "-f", "${Version}\n", package], capture_output=True, text=True, check=False)
            return package, version.stdout.splitlines()[0]
    return path.name, UNKNOWN


def named_in(text: str) -> str:
    """The licence of an old copyright file, which names it in prose."""
    found = re.findall(r"/usr/share/common-licenses/([\w.-]*\w)", text)
    return ", ".join(dict.fromkeys(found)) or UNKNOWN


def bill(parts: list[Part]) -> str:
    def component(part: Part) -> dict:
        return {"type": part.kind, "name": part.name, "version": part.version, "licenses": [{"license": {"name": part.licence}}]}
    return json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
                       "metadata": {"component": component(parts[0])},
                       "components": [component(part) for part in parts[1:]]}, indent=1) + "\n"


def lay_texts(parts: list[Part], folder: Path) -> None:
    """One file a part."""
    folder.mkdir()
    for part in parts:
        if part.texts:
            (folder / part.name).write_text("\n".join(path.read_text(errors="replace") for path in part.texts))
