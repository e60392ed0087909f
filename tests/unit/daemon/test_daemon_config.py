"""A domain's configuration through the daemon: defined, edited, copied by hand or broken, and what is live and what is stored."""
import os
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.client import of
from tests.unit.daemon.host import WEB


def test_define_keeps_comments_and_makes_what_is_absent_once(running):
    answer = running.define(WEB + "[interface 0]\ntype = user\n")
    assert answer["created"] and answer["made"] == ["uuid", "[interface 0] mac"]
    written = running.file("web").read_text()
    assert "# Ann's server\n" in written and "# do not rename" in written and answer["domain"]["uuid"] in written
    again = running.define(WEB + "[interface 0]\ntype = user\n")
    assert not again["created"] and again["domain"]["uuid"] == answer["domain"]["uuid"]
    assert running.file("web").read_text() == written


def test_relative_paths_belong_to_the_folder_the_text_came_from(running):
    running.define(WEB + "[disk vda]\nsource = disks/web.img\n")
    assert "source = /home/ann/disks/web.img" in running.file("web").read_text()


def test_bad_text_names_file_and_line(running):
    with pytest.raises(errors.ConfigError) as caught:
        running.define("name = web\nmemroy = 64\n")
    assert str(caught.value) == "/home/ann/web.conf:2: memroy = '64': unknown key" and caught.value.hint == "did you mean memory?"
    assert running.states() == {}


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-rf", "", "x" * 201, "tab\there"])
def test_impossible_names_are_refused(running, name):
    with pytest.raises(errors.ConfigError):
        running.define(f"name = {name}\nmemory = 64\n")
    assert os.listdir(running.paths.domains) == ["autostart"]


def test_name_and_uuid_clashes(running):
    uuid = running.define()["domain"]["uuid"]
    with pytest.raises(errors.NameInUse, match=f"domain 'web' is already defined with uuid {uuid}"):
        running.define(WEB.replace("name = web", f"uuid = {uuid}\nname = mail"))
    with pytest.raises(errors.NameInUse, match=f"domain 'web' already exists with uuid {uuid}"):
        running.define(WEB.replace("name = web", "uuid = 11111111-2222-3333-4444-555555555555\nname = web"))
    with pytest.raises(errors.NameInUse) as caught:
        running.define(replace=False)
    assert caught.value.message == "Guest name 'web' is already in use."


def test_rename(running):
    uuid = running.define()["domain"]["uuid"]
    running.post("web", "autostart", enabled=True)
    running.post("web", "rename", name="www")
    one = running.domain("www")
    assert (one["uuid"], one["autostart"]) == (uuid, True) and list(running.states()) == ["www"]
    assert "name = www   # do not rename" in running.file("www").read_text()
    assert os.readlink(os.path.join(running.paths.autostart, "www.conf")) == "../www.conf"
    running.post("www", "start")
    with pytest.raises(errors.DomainRunning):
        running.post("www", "rename", name="web")


def test_autostart_links_come_and_go(running):
    running.define()
    link = os.path.join(running.paths.autostart, "web.conf")
    assert running.post("web", "autostart", enabled=True)["domain"]["autostart"]
    assert Path(link).resolve() == running.file("web").resolve()
    assert not running.post("web", "autostart", enabled=False)["domain"]["autostart"] and not os.path.lexists(link)


def test_edit_refuses_what_was_changed_meanwhile(running):
    running.define()
    with running.client() as client:
        got = client.get(of("web", "config"))
        assert got["text"] == running.file("web").read_text()
        running.file("web").write_text(got["text"] + "# changed by hand\n")
        with pytest.raises(errors.KvmappError) as caught:
            client.put(of("web", "config"), text=got["text"].replace("64 MiB", "128 MiB"), digest=got["digest"])
        assert caught.value.code == "changed-meanwhile"
        got = client.get(of("web", "config"))
        client.put(of("web", "config"), text=got["text"].replace("64 MiB", "128 MiB"), digest=got["digest"])
        with pytest.raises(errors.ConfigError, match="edit does not rename"):
            client.put(of("web", "config"), text=got["text"].replace("name = web", "name = mail"))
    assert running.domain("web")["memory"] == 128 << 20
    assert "# changed by hand" in running.file("web").read_text()


def test_live_and_stored_configuration_part_ways(running):
    running.define()
    running.post("web", "start")
    running.post("web", "vcpus", count=4, config=True)
    with running.client() as client:
        assert client.get(of("web", "config"))["config"]["vcpus"] == 1
        assert client.get(of("web", "config"), inactive=True)["config"]["vcpus"] == 4
    assert running.domain("web")["vcpus"] == 1
    with pytest.raises(errors.Unsupported):
        running.post("web", "vcpus", count=2)
    running.post("web", "destroy")
    assert running.domain("web")["vcpus"] == 4


def test_setmem_live_and_stored(running):
    running.define()
    running.post("web", "memory", bytes=32 << 20)
    assert "current_memory = 32 MiB" in running.file("web").read_text()
    running.post("web", "start")
    answer = running.post("web", "memory", bytes=48 << 20)
    assert answer["balloon"] == 48 << 20 and answer["domain"]["current_memory"] == 48 << 20
    assert "current_memory = 32 MiB" in running.file("web").read_text()
    with pytest.raises(errors.ConfigError, match="its maximum is 65536 KiB"):
        running.post("web", "memory", bytes=1 << 30)
    with pytest.raises(errors.DomainRunning, match="maximum memory"):
        running.post("web", "memory", bytes=1 << 30, maximum=True)
    running.add("stiff")
    running.post("stiff", "start")
    with pytest.raises(errors.Unsupported, match="no balloon"):
        running.post("stiff", "memory", bytes=32 << 20)


def test_title_live_and_stored(running):
    running.define()
    running.post("web", "start")
    running.post("web", "description", title="The web server", live=True, config=True)
    assert running.domain("web")["title"] == "The web server" and "title = The web server" in running.file("web").read_text()
    running.post("web", "description", title="", live=True, config=True)
    assert running.domain("web")["title"] is None and "title" not in running.file("web").read_text()


def test_files_copied_by_hand_are_seen_at_once(running):
    running.add("copied")
    assert running.states() == {"copied": "shut off"}
    uuid = running.domain("copied")["uuid"]
    assert f"uuid = {uuid}" in running.file("copied").read_text()
    running.file("copied").unlink()
    assert running.states() == {}


def test_a_file_that_is_still_being_copied_is_not_written_to(running):
    running.file("slow").write_text("name = slow\nmemory = 64\n")
    uuid = running.domain("slow")["uuid"]
    assert running.file("slow").read_text() == "name = slow\nmemory = 64\n"
    running.file("slow").write_text("name = slow\nmemory = 128\n")
    assert running.domain("slow")["uuid"] == uuid                          # made once, though no file has it yet


def test_broken_file_is_a_broken_domain_with_the_reason(running):
    running.add("good")
    running.file("bad").write_text("name = bad\nmemory = lots\n")
    assert running.states() == {"good": "shut off", "bad": "broken"}
    one = running.domain("bad")
    assert one["text"].startswith(f"{running.file('bad')}:2: memory = 'lots'") and one["uuid"] is None
    with pytest.raises(errors.ConfigError):
        running.post("bad", "start")
    with running.client() as client:
        client.put(of("bad", "config"), text="name = bad\nmemory = 64\n")
    assert running.states()["bad"] == "shut off"


def test_broken_file_of_a_running_domain_hurts_nobody(running):
    running.define()
    running.post("web", "start")
    running.file("web").write_text("garbage")
    one = running.domain("web")
    assert one["state"] == "running" and "its file is broken" in one["warnings"][0]
    running.post("web", "destroy")
    assert running.domain("web")["state"] == "broken"
    with running.client() as client:
        assert client.delete(of("web"))["left"][-1].startswith("log ")
    assert running.states() == {}
