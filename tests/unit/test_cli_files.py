"""The verbs about a domain's file: define, create, undefine, dumpconf, desc, edit."""
import os
from pathlib import Path

import pytest

from kvmapp.errors import ConfigError
from tests.unit.canned_daemon import config_answer


def test_define_and_create_send_the_text(daemon, ctl, tmp_path):
    file = tmp_path / "web.conf"
    file.write_text("name = linuxvm03\n# kept\n")
    defined = {"domain": daemon_domain(daemon, "linuxvm03"), "created": True, "made": ["uuid"], "warnings": []}
    daemon.answers["POST", "/v1/domains"] = lambda query, body: defined
    assert ctl("define", str(file)) == (0, f"Domain linuxvm03 defined from {file}\n\n", "made: uuid\n")
    assert daemon.requests[-1][2] == {"text": "name = linuxvm03\n# kept\n", "file": str(file)}
    assert ctl("create", str(file), "--paused")[1] == f"Domain linuxvm03 created from {file}\n\n"
    assert daemon.requests[-1][2]["transient"] is True and daemon.requests[-1][2]["paused"] is True


def daemon_domain(daemon, name):
    return {key: value for key, value in daemon.domains[name].items()}


@pytest.mark.parametrize(("content", "message"), [
    (None, "Failed to open file '{}': No such file or directory"), (b"<domain type='kvm'>", "'{}' is XML; kvmapp's domains are INI files"),
    (b"QFI\xfb\0\0", "'{}' is no text of a domain"), (b"x" * (2 << 20), "'{}' is no text of a domain")])
def test_files_that_are_no_domain(daemon, ctl, tmp_path, content, message):
    file = tmp_path / "x"
    if content is not None:
        file.write_bytes(content)
    status, _, err = ctl("define", str(file))
    assert (status, err.splitlines()[:2]) == (1, [f"error: Failed to define domain from {file}", f"error: {message.format(file)}"])
    assert daemon.requests == []


def test_define_shows_file_and_line(daemon, ctl, tmp_path):
    file = tmp_path / "x.conf"
    file.write_text("name = x\nmemroy = 1\n")
    daemon.answers["POST", "/v1/domains"] = ConfigError("unknown key 'memroy'", "did you mean memory?", file=str(file), line=2)
    assert ctl("define", str(file))[2] == (f"error: Failed to define domain from {file}\nerror: {file}:2: unknown key 'memroy'\n"
                                           "hint: did you mean memory?\n")


def test_undefine_says_what_it_left(daemon, ctl):
    daemon.answers["DELETE", "/v1/domains/linuxvm03"] = {"name": "linuxvm03", "removed": [], "left": ["disk vda (/data/x3.img)"],
                                                         "still_runs": False}
    assert ctl("undefine", "linuxvm03", "--nvram", "--managed-save")[1] == (
        "Domain linuxvm03 has been undefined\nleft: disk vda (/data/x3.img)\n\n")
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer(disks=[{"name": "vda", "source": "/data/x3.img"}])
    ctl("undefine", "linuxvm03", "--storage", "/data/x3.img")
    assert daemon.requests[-1] == ("DELETE", "/v1/domains/linuxvm03", {"storage": "vda"})
    ctl("undefine", "linuxvm03", "--remove-all-storage")
    assert daemon.requests[-1] == ("DELETE", "/v1/domains/linuxvm03", {"remove_all_storage": "1"})
    assert "has no disk 'vdz'" in ctl("undefine", "linuxvm03", "--storage", "vdz")[2]


def test_dumpconf_and_dumpxml(daemon, ctl):
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer()
    assert ctl("dumpconf", "linuxvm03", "--inactive") == (0, "name = linuxvm03\n\n", "")
    status, out, err = ctl("dumpxml", "linuxvm03", "--security-info", "--migratable")
    assert (status, out) == (0, "name = linuxvm03\n\n") and "INI" in err


def test_desc(daemon, ctl):
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer(description="two\nlines", title=None)
    assert ctl("desc", "linuxvm03")[1] == "two\nlines\n"
    assert ctl("desc", "linuxvm03", "--title")[1] == "No title for domain: linuxvm03\n"


def test_desc_in_an_editor(daemon, ctl, monkeypatch):
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer(description="old words\n")
    monkeypatch.setenv("VISUAL", "sed -i s/old/new/")
    assert ctl("desc", "linuxvm03", "--edit", "--config")[1] == "Domain description updated successfully\n\n"
    assert daemon.requests[-1] == ("POST", "/v1/domains/linuxvm03/description", {"description": "new words", "config": True})


@pytest.mark.parametrize(("editor", "kept"), [("sed -i s/old/new/", "new words\n"), ("sed -i s/old/mad/ $1; false", "mad words\n")])
def test_desc_keeps_a_text_that_is_not_taken(daemon, ctl, monkeypatch, editor, kept):
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer(description="old words\n")
    daemon.answers["POST", "/v1/domains/linuxvm03/description"] = ConfigError("description = ...: expected at most 4096 bytes")
    monkeypatch.setenv("VISUAL", editor)
    status, _, err = ctl("desc", "linuxvm03", "--edit")
    place = Path(err.partition("your text is kept in ")[2].strip())
    assert status == 1 and place.read_text() == kept
    place.unlink()


def test_edit_saves_what_the_editor_left(daemon, ctl, monkeypatch):
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer("vcpus = 1\n")
    daemon.answers["PUT", "/v1/domains/linuxvm03/config"] = {"domain": daemon.domains["linuxvm03"], "created": False, "made": [],
                                                             "warnings": []}
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i s/1/2/")
    assert ctl("edit", "linuxvm03")[1] == "Domain linuxvm03 configuration edited.\n\n"
    assert daemon.requests[-1] == ("PUT", "/v1/domains/linuxvm03/config", {"text": "vcpus = 2\n", "digest": "d1"})
    monkeypatch.setenv("VISUAL", "true")
    assert ctl("edit", "linuxvm03")[1] == "Domain linuxvm03 configuration not changed.\n\n"


def test_edit_keeps_a_rejected_text(daemon, ctl, monkeypatch):
    daemon.answers["GET", "/v1/domains/linuxvm03/config"] = config_answer("vcpus = 1\n")
    daemon.answers["PUT", "/v1/domains/linuxvm03/config"] = ConfigError("vcpus = 900: expected a number", file="/f", line=1)
    monkeypatch.setenv("VISUAL", "sed -i s/1/900/")
    status, _, err = ctl("edit", "linuxvm03")
    lines = err.splitlines()
    assert (status, lines[:2]) == (1, ["error: Failed to edit domain 'linuxvm03'", "error: /f:1: vcpus = 900: expected a number"])
    kept = lines[2].removeprefix("hint: your text is kept in ")
    assert Path(kept).read_text() == "vcpus = 900\n"
    os.unlink(kept)
    monkeypatch.setenv("VISUAL", "false")
    err = ctl("edit", "linuxvm03")[2]
    assert "The editor 'false' ended with status 1; nothing was changed" in err
    os.unlink(err.split("kept in ")[1].strip())
