"""A domain's life through the daemon: defined, started, asked, stopped, undefined; and what others see of it meanwhile."""
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.client import Client, of
from kvmapp.daemon.cgroups import Cgroups
from kvmapp.daemon.main import cgroup_name
from tests.unit.daemon.host import DAEMON, IS_ROOT, ROOT, SOCKET_GROUP

TEXT = "# Ann's server\nname = web   # do not rename\nmemory = 64 MiB\n[serial 0]\n[balloon]\n"


def define(host, text=TEXT, **more):
    with host.client() as client:
        return client.post("/v1/domains", text=text, file="/home/ann/web.conf", **more)


def test_define_keeps_comments_and_makes_what_is_absent_once(running):
    answer = define(running, TEXT + "[interface 0]\ntype = user\n")
    assert answer["created"] and answer["made"] == ["uuid", "[interface 0] mac"]
    written = running.file("web").read_text()
    assert "# Ann's server\n" in written and "# do not rename" in written and answer["domain"]["uuid"] in written
    again = define(running, TEXT + "[interface 0]\ntype = user\n")
    assert not again["created"] and again["domain"]["uuid"] == answer["domain"]["uuid"]
    assert running.file("web").read_text() == written


def test_relative_paths_belong_to_the_folder_the_text_came_from(running):
    define(running, TEXT + "[disk vda]\nsource = disks/web.img\n")
    assert "source = /home/ann/disks/web.img" in running.file("web").read_text()


def test_bad_text_names_file_and_line(running):
    with pytest.raises(errors.ConfigError) as caught:
        define(running, "name = web\nmemroy = 64\n")
    assert str(caught.value) == "/home/ann/web.conf:2: memroy = '64': unknown key" and caught.value.hint == "did you mean memory?"
    assert running.states() == {}


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "-rf", "", "x" * 201, "tab\there"])
def test_impossible_names_are_refused(running, name):
    with pytest.raises(errors.ConfigError):
        define(running, f"name = {name}\nmemory = 64\n")
    assert os.listdir(running.paths.domains) == ["autostart"]


@pytest.mark.parametrize("name", ["x" * 200, "мой сервер", "server (old) v1.2", "日本語" * 20, "a'b", "100%", "memory.max", "a.conf"])
def test_unusual_names_live_a_whole_life(running, name):
    quoted = f'"{name}"' if "'" in name else name
    define(running, f"name = {quoted}\nmemory = 64\n")
    running.post(name, "start")
    assert running.domain(name)["state"] == "running"
    assert running.get(name, "stats")["exits"]["hlt"] == 3
    running.post(name, "destroy")
    with running.client() as client:
        assert client.delete(of(name))["name"] == name
    assert running.states() == {}


def test_start_gives_a_process_of_its_own(running):
    define(running)
    started = running.post("web", "start")["domain"]
    assert (started["state"], started["reason"]) == ("running", "booted") and started["id"] > 0
    said = running.told("web", "test_identity")
    assert said["sid"] == started["pid"]
    with open(f"/proc/{started['pid']}/comm") as comm, open(f"/proc/{started['pid']}/cmdline") as line:
        assert comm.read() == "kvmapp: web\n" and line.read().rstrip("\0") == "kvmapp: web"
    if IS_ROOT:
        assert said["uid"] != 0 and said["gid"] != 0 and said["groups"] == []
        assert int(said["capabilities"], 16) == 0 and int(said["bounding"], 16) == 0
    assert said["no_new_privs"] == "1"


def test_a_domain_inherits_nothing_that_is_not_its_own(running):
    define(running)
    running.post("web", "start")
    define(running, TEXT.replace("web", "mail"))
    running.post("mail", "start")
    opened = running.told("mail", "test_identity")["fds"]
    own = ("/dev/null", "socket:", "anon_inode:", "/proc/", running.paths.domain_log("mail"), running.paths.domain_own("mail"))
    assert [name for name in opened if not name.startswith(own)] == []
    assert sum(name.startswith("socket:") for name in opened) == 3         # its control socket, the daemon, and who asks here


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
def test_guests_are_kept_from_the_daemons_socket(running):
    """A guest that breaks out of its process is user nobody here: it may neither command the daemon nor other domains."""
    define(running)
    started = running.post("web", "start")["domain"]
    status = os.stat(running.paths.control("web"))
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o660)
    assert os.stat(running.paths.domain_run("web")).st_uid == 0 and started["pid"]
    running.write("guest.conf", f"user = nobody\ngroup = {SOCKET_GROUP}\n")
    running.add("mail")
    with pytest.raises(errors.ConfigError, match="would command the daemon"):
        running.post("mail", "start")


def test_log_has_the_start_with_the_whole_configuration(running):
    define(running)
    running.post("web", "start")
    first = Path(running.paths.domain_log("web")).read_text().splitlines()[0]
    assert "starting, kvmapp" in first and '"memory": 67108864' in first
    with running.client() as client:
        assert first in client.get(of("web", "log"))["lines"]


def test_ids_grow_and_a_second_start_is_refused(running):
    define(running)
    define(running, TEXT.replace("web", "mail"))
    first = running.post("web", "start")["domain"]["id"]
    assert running.post("mail", "start")["domain"]["id"] == first + 1
    with pytest.raises(errors.DomainRunning) as caught:
        running.post("web", "start")
    assert caught.value.message == "Domain is already active"
    running.post("web", "destroy")
    assert running.post("web", "start")["domain"]["id"] == first + 2
    assert running.domain(f"{first + 2}")["name"] == "web" and running.domain(running.domain("web")["uuid"].upper())["name"] == "web"


def test_unknown_domain_is_told_with_the_nearest(running):
    define(running)
    with pytest.raises(errors.DomainNotFound) as caught:
        running.domain("wev")
    assert caught.value.message == "failed to get domain 'wev'" and caught.value.hint == "did you mean web?"


def test_suspend_resume_reset(running):
    define(running)
    running.post("web", "start")
    assert (lambda one: (one["state"], one["reason"]))(running.post("web", "suspend")["domain"]) == ("paused", "user")
    assert (lambda one: (one["state"], one["reason"]))(running.post("web", "resume")["domain"]) == ("running", "unpaused")
    assert (lambda one: (one["state"], one["reason"]))(running.post("web", "reset")["domain"]) == ("running", "booted")
    assert running.post("web", "reboot")["domain"]["state"] == "running"


def test_started_paused(running):
    define(running)
    assert running.post("web", "start", paused=True)["domain"]["state"] == "paused"
    assert running.post("web", "resume")["domain"]["state"] == "running"


def test_shutdown_waits_and_tells_how_it_ended(running):
    define(running)
    running.post("web", "start")
    ended = running.post("web", "shutdown", timeout=10)["domain"]
    assert (ended["state"], ended["reason"], ended["text"], ended["id"]) == ("shut off", "shutdown", "the guest powered off", None)
    assert running.records() == {}
    with pytest.raises(errors.DomainNotRunning):
        running.post("web", "shutdown")


def test_guest_that_ignores_acpi_is_told(running):
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    with pytest.raises(errors.GuestIgnored) as caught:
        running.post("deaf", "shutdown", timeout=0.1)
    assert "ignores ACPI" in caught.value.message and "destroy" in caught.value.hint
    assert running.domain("deaf")["state"] == "running"
    assert running.post("deaf", "destroy")["domain"]["reason"] == "destroyed"


def test_shutdown_without_acpi_says_so(running):
    running.add("old", acpi="no")
    running.post("old", "start")
    with pytest.raises(errors.KvmappError) as caught:
        running.post("old", "shutdown")
    assert caught.value.code == "wrong-state" and caught.value.hint == "acpi = yes"


def test_destroy_goes_through_while_somebody_waits_for_a_shutdown(running):
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    answers = []
    waiter = threading.Thread(target=lambda: answers.append(running.post("deaf", "shutdown", timeout=60)))
    waiter.start()
    running.eventually(lambda: running.get("deaf", "stats")["exits"]["power"] and not running.domain("deaf")["job"])
    running.post("deaf", "destroy")
    waiter.join(20)
    assert answers[0]["domain"]["reason"] == "destroyed"


def test_undefine_says_what_it_left(running, tmp_path):
    image = tmp_path / "web.img"
    image.write_bytes(b"\0" * 512)
    define(running, TEXT + f"[disk vda]\nsource = {image}\n")
    running.post("web", "autostart", enabled=True)
    with running.client() as client:
        answer = client.delete(of("web"))
    assert answer["left"] == [f"disk vda ({image})"] and "autostart link" in answer["removed"]
    assert image.exists() and os.listdir(running.paths.autostart) == [] and running.states() == {}


def test_undefine_with_storage_keeps_what_is_shared(running, tmp_path):
    own, shared = tmp_path / "own.img", tmp_path / "shared.img"
    for image in (own, shared):
        image.write_bytes(b"\0" * 512)
    disks = f"[disk vda]\nsource = {own}\n[disk vdb]\nsource = {shared}\n"
    define(running, TEXT + disks)
    define(running, TEXT.replace("web", "mail") + f"[disk vda]\nsource = {shared}\n")
    with running.client() as client:
        answer = client.delete(of("web"), remove_all_storage=True)
    assert f"disk vda ({own})" in answer["removed"] and answer["left"] == [f"disk vdb ({shared}): domain 'mail' uses it too"]
    assert not own.exists() and shared.exists()


def test_undefine_of_a_running_domain_leaves_it_transient(running):
    define(running)
    pid = running.post("web", "start")["domain"]["pid"]
    with running.client() as client:
        assert client.delete(of("web"))["still_runs"]
    one = running.domain("web")
    assert not one["persistent"] and one["pid"] == pid
    running.post("web", "destroy")
    assert running.states() == {}


def test_transient_domain_is_gone_when_it_ends(running):
    assert define(running, transient=True)["domain"]["state"] == "running"
    assert not running.file("web").exists() and not running.domain("web")["persistent"]
    with pytest.raises(errors.KvmappError, match="transient"):
        running.post("web", "autostart")
    running.post("web", "shutdown", timeout=10)
    assert running.states() == {}


def test_rename(running):
    uuid = define(running)["domain"]["uuid"]
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
    define(running)
    link = os.path.join(running.paths.autostart, "web.conf")
    assert running.post("web", "autostart", enabled=True)["domain"]["autostart"]
    assert Path(link).resolve() == running.file("web").resolve()
    assert not running.post("web", "autostart", enabled=False)["domain"]["autostart"] and not os.path.lexists(link)


def test_edit_refuses_what_was_changed_meanwhile(running):
    define(running)
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
    define(running)
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
    define(running)
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
    define(running)
    running.post("web", "start")
    running.post("web", "description", title="The web server", live=True, config=True)
    assert running.domain("web")["title"] == "The web server" and "title = The web server" in running.file("web").read_text()
    running.post("web", "description", title="", live=True, config=True)
    assert running.domain("web")["title"] is None and "title" not in running.file("web").read_text()


def test_mac_clash_is_told_and_a_running_one_refused(running):
    card = "[interface 0]\ntype = user\nmac = 52:54:00:00:00:01\n"
    define(running, TEXT + card)
    answer = define(running, TEXT.replace("web", "mail") + card)
    assert answer["warnings"] == ["MAC 52:54:00:00:00:01 is an interface's of domain 'web' too"]
    running.post("web", "start")
    with pytest.raises(errors.NameInUse, match="runs with the same MAC address"):
        running.post("mail", "start")


def test_disk_of_a_running_domain_is_refused(running, tmp_path):
    image = tmp_path / "web.img"
    image.write_bytes(b"\0" * 512)
    define(running, TEXT + f"[disk vda]\nsource = {image}\n")
    define(running, TEXT.replace("web", "mail") + f"[disk vda]\nsource = {image}\n")
    running.post("web", "start")
    with pytest.raises(errors.GuestImageError, match="it is disk 'vda' of domain 'web', which runs"):
        running.post("mail", "start")
    assert running.domain("mail")["state"] == "shut off" and list(running.records()) == ["web"]


def test_name_and_uuid_clashes(running):
    uuid = define(running)["domain"]["uuid"]
    with pytest.raises(errors.NameInUse, match=f"domain 'web' is already defined with uuid {uuid}"):
        define(running, TEXT.replace("name = web", f"uuid = {uuid}\nname = mail"))
    with pytest.raises(errors.NameInUse, match=f"domain 'web' already exists with uuid {uuid}"):
        define(running, TEXT.replace("name = web", "uuid = 11111111-2222-3333-4444-555555555555\nname = web"))
    with pytest.raises(errors.NameInUse) as caught:
        define(running, replace=False)
    assert caught.value.message == "Guest name 'web' is already in use."


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
    define(running)
    running.post("web", "start")
    running.file("web").write_text("garbage")
    one = running.domain("web")
    assert one["state"] == "running" and "its file is broken" in one["warnings"][0]
    running.post("web", "destroy")
    assert running.domain("web")["state"] == "broken"
    with running.client() as client:
        assert client.delete(of("web"))["left"][-1].startswith("log ")
    assert running.states() == {}


def test_events_tell_a_life(running):
    with running.client() as listener:
        stream = listener.events()
        listener_ready = threading.Event()
        seen = []

        def listen():
            for event in stream:
                listener_ready.set()
                if event["event"] == "lifecycle":
                    seen.append((event["type"], event["detail"]))
                if event["type"] == "Undefined":
                    return
        thread = threading.Thread(target=listen)
        thread.start()
        running.add("knock")
        while not listener_ready.wait(0.05):                # the stream is open when the first event arrives
            running.file("knock").touch()
            running.states()
        seen.clear()
        define(running)
        running.post("web", "start")
        running.post("web", "suspend")
        running.post("web", "resume")
        running.post("web", "shutdown", timeout=10)
        with running.client() as client:
            client.delete(of("web"))
        thread.join(20)
    assert seen == [("Defined", "Added"), ("Started", "Booted"), ("Suspended", "Paused"), ("Resumed", "Unpaused"),
                    ("Stopped", "Shutdown"), ("Undefined", "Removed")]


def test_wait_answers_when_the_state_comes(running):
    define(running)
    with running.client() as client:
        assert client.get(of("web", "wait"), state="running", timeout=0.05)["reached"] is False
    answers = []
    with running.client() as waiting:
        thread = threading.Thread(target=lambda: answers.append(waiting.get(of("web", "wait"), state="running,crashed", timeout=20)))
        thread.start()
        running.post("web", "start")
        thread.join(20)
    assert answers[0]["reached"] and answers[0]["domain"]["state"] == "running"
    with running.client() as client, pytest.raises(errors.UsageError):
        client.get(of("web", "wait"), state="nonsense")


def test_read_only_socket_looks_and_touches_nothing(running):
    define(running)
    with running.client(read_only=True) as client:
        assert client.get("/v1/domains")["domains"][0]["name"] == "web"
        assert client.get("/v1/daemon")["access"] == "read-only"
        for attempt in (lambda: client.post(of("web", "start")), lambda: client.delete(of("web")), lambda: client.get(of("web", "log")),
                        lambda: client.post("/v1/domains", text=TEXT)):
            with pytest.raises(errors.PermissionDenied):
                attempt()
    assert running.states() == {"web": "shut off"}
    assert os.stat(running.paths.socket).st_mode & 0o777 == 0o660
    assert os.stat(running.paths.read_only_socket).st_mode & 0o777 == 0o666


def test_every_query_answers_as_described(running):
    define(running)
    running.post("web", "start")
    with running.client() as client:
        for path in ("/v1/version", "/v1/daemon", "/v1/node", "/v1/node/memstats", "/v1/capabilities", "/v1/autostart", "/v1/stats",
                     "/v1/domains", of("web"), of("web", "stats"), of("web", "vcpus"), of("web", "config")):
            client.get(path)
        assert len(client.get("/v1/node/cpustats", all=True)["cpus"]) > 1
        assert client.get("/v1/openapi.json")["openapi"] == "3.1.0"
        assert client.get("/v1/stats")["domains"][0]["exits"]["hlt"] == 3
        assert client.post("/v1/daemon/reload")["domains"] == 1


@pytest.mark.parametrize(("method", "path", "body", "words"), [
    ("GET", "/v2/domains", None, "The daemon knows no GET /v2/domains"),
    ("PATCH", "/v1/domains", None, "The daemon knows no PATCH"),
    ("GET", "/v1/domains?nam=x", None, "nam is not known here"),
    ("GET", "/v1/node/cpustats?cpu=x", None, "cpu = 'x': expected a integer"),
    ("POST", "/v1/domains", {"txt": "x"}, "txt is not known here (known: text"),
    ("POST", "/v1/domains", {}, "either text or config is wanted"),
    ("POST", "/v1/domains", {"text": 5}, "text is 5, not string"),
    ("POST", "/v1/domains", {"text": "x" * (2 << 20)}, "larger than 1024 KiB"),
    ("POST", "/v1/domains", {"text": "#" * 300_000}, "larger than 256 KiB"),
    ("POST", "/v1/domains/x/start", [1], "it is [1], not object")])
def test_bad_requests_are_refused_in_words(running, method, path, body, words):
    with pytest.raises(errors.KvmappError) as caught, Client(running.paths.socket) as client:
        client.request(method, path, body)
    assert words in str(caught.value)


def test_reload_takes_new_settings_and_survives_bad_ones(running):
    running.write("kvmapp.conf", f"unix_sock_group = {SOCKET_GROUP}\nunix_sock_rw_perms = 0600\n")
    with running.client() as client:
        assert client.post("/v1/daemon/reload")["warnings"] == []
        assert os.stat(running.paths.socket).st_mode & 0o777 == 0o600
        running.write("kvmapp.conf", "nonsense\n")
        assert "kvmapp.conf:1:" in client.post("/v1/daemon/reload")["warnings"][0]
        assert client.get("/v1/domains") == {"domains": []}


def test_second_daemon_says_who_runs(running):
    second = subprocess.run([sys.executable, "-c", DAEMON, "--background", "--root", running.root], cwd=ROOT, capture_output=True,
                            text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: A kvmapp daemon runs already (pid {running.process.pid})\n")
    assert running.states() == {}


def test_background_returns_when_it_answers(host):
    ready = subprocess.run([sys.executable, "-c", DAEMON, "--background", "--root", host.root], cwd=ROOT, capture_output=True,
                           text=True, timeout=30, check=False)
    assert (ready.returncode, ready.stderr) == (0, "")
    with host.client() as client:
        pid = client.get("/v1/daemon")["pid"]
    assert Path(host.paths.pid_file).read_text() == f"{pid}\n"
    os.kill(pid, 15)
    host.eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    assert not os.path.lexists(host.paths.socket) and not os.path.lexists(host.paths.pid_file)
    assert "stopped; 0 domains run on" in Path(host.paths.daemon_log).read_text()


def test_background_tells_why_it_cannot_begin(host):
    host.write("kvmapp.conf", "log_level = loud\n")
    failed = subprocess.run([sys.executable, "-c", DAEMON, "--background", "--root", host.root], cwd=ROOT, capture_output=True,
                            text=True, timeout=30, check=False)
    assert failed.returncode == 1 and "kvmapp.conf:1: log_level = 'loud'" in failed.stderr


def test_a_hundred_starts_at_once(host):
    names = [f"d{number:03}" for number in range(100)]
    for name in names:
        host.add(name, uuid=f"00000000-0000-4000-8000-{int(name[1:]):012}")
    host.start()
    failures = []

    def start(name):
        try:
            host.post(name, "start")
        except errors.KvmappError as error:
            failures.append((name, str(error)))
    threads = [threading.Thread(target=start, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert set(host.states().values()) == {"running"}
    assert sorted(record["id"] for record in host.records().values()) == list(range(1, 101))
    started = time.monotonic()
    host.states()
    assert time.monotonic() - started < 5


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
def test_each_domain_has_a_control_group_that_goes_with_it(running):
    define(running)
    pid = running.post("web", "start")["domain"]["pid"]
    bases = Cgroups(cgroup_name(running.paths)).bases
    if not bases:
        pytest.skip("this host has no control groups that can be written")

    def members():
        groups = [Path(base, "domain-web", "cgroup.procs") for base in bases]
        return [group.read_text().split() if group.exists() else [] for group in groups]
    running.eventually(lambda: members() == [[str(pid)]] * len(bases))
    running.post("web", "destroy")
    running.eventually(lambda: not any(Path(base, "domain-web").exists() for base in bases))
