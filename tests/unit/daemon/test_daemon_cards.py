"""Cards that come, go and change, of the file and of the running domain: by cards of type user, which want no privileges."""
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp import errors
from tests.unit.daemon.host import UUID

MAC, OTHER, FOURTH = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:04"
USER = f"[interface 0]\ntype = user\nmac = {MAC}\n"


def cards(host, inactive=False):
    config = host.get("web", "config", inactive=int(inactive))["config"]
    return {card["mac"]: card for card in config["interfaces"]}


def test_a_card_is_attached_to_the_file_to_the_running_domain_or_both(host):
    host.start()
    host.add("web", rest=USER)
    made = host.post("web", "interfaces", settings={"type": "user"})["interface"]
    assert made["index"] == 1 and made["mac"].startswith("52:54:00:") and list(cards(host)) == [MAC, made["mac"]]
    assert "[interface 1]\ntype = user\nmac = " in host.file("web").read_text()
    host.post("web", "start")
    live = host.post("web", "interfaces", settings={"type": "user", "mac": "52:54:00:00:00:07"})["interface"]
    assert live["index"] == 2 and "52:54:00:00:00:07" in cards(host) and "52:54:00:00:00:07" not in cards(host, inactive=True)
    host.post("web", "interfaces", settings={"type": "user", "mac": "52:54:00:00:00:08"}, persistent=True)
    assert all("52:54:00:00:00:08" in cards(host, inactive) for inactive in (False, True))
    host.post("web", "interfaces", settings={"type": "user", "mac": "52:54:00:00:00:09"}, config=True)
    assert "52:54:00:00:00:09" not in cards(host)
    assert host.post("web", "interfaces", settings={"type": "user", "mac": ""})["interface"]["mac"].startswith("52:54:00:")
    host.kill()
    host.start()
    assert "52:54:00:00:00:07" in cards(host), "the next daemon knows of it"


def test_a_card_that_goes_while_no_daemon_hears_of_it_is_gone_for_the_next_one(host):
    host.start()
    host.add("web", rest=USER + "[interface 1]\ntype = user\nmac = 52:54:00:00:00:02\n")
    host.post("web", "start")
    host.kill()
    host.told("web", "detach-device", device="net0")
    host.start()
    assert list(cards(host)) == ["52:54:00:00:00:02"] and MAC in cards(host, inactive=True)
    host.post("web", "interfaces", settings={"type": "user", "mac": MAC})
    assert MAC in cards(host), "there is room for it again"


def test_a_card_is_detached_when_the_guest_has_let_go(running):
    running.add("web", rest=USER)
    running.post("web", "start")
    assert running.post("web", "interfaces", "detach", type="user", persistent=True)["warnings"] == []
    assert cards(running) == {} and "interface" not in running.file("web").read_text()
    with pytest.raises(errors.UsageError, match="No interface found whose type is user"):
        running.post("web", "interfaces", "detach", type="user")


TWO = USER + f"[interface 1]\ntype = user\nmac = {OTHER}\n"


def test_cards_stay_in_their_slots(running):
    """By which guests name them."""
    running.add("web", rest=TWO)
    running.post("web", "start")
    made = running.post("web", "interfaces", settings={"type": "user"}, persistent=True)["interface"]["mac"]
    assert slots(running) == slots(running, live=True) == {MAC: None, OTHER: None, made: 8}, "where it stands in the running domain"
    running.post("web", "interfaces", "detach", interface=MAC, persistent=True)
    assert slots(running) == slots(running, live=True) == {OTHER: 2, made: 8}
    running.post("web", "interfaces", settings={"type": "user", "mac": MAC}, config=True)
    assert slots(running) == {MAC: None, OTHER: 2, made: 8}
    running.post("web", "interfaces", settings={"type": "user", "mac": FOURTH, "slot": "30"}, persistent=True)
    assert slots(running)[FOURTH] == slots(running, live=True)[FOURTH] == 30
    for where in ("config", "live"):
        with pytest.raises(errors.ConfigError, match=r"PCI slot 30 is not free for net[04]: net3 stands there"):
            running.post("web", "interfaces", settings={"type": "user", "slot": "30"}, **{where: True})
    assert len(slots(running)) == 4 and len(slots(running, live=True)) == 3
    text = running.get("web", "config")["text"]
    assert "slot = 2\n" in text and "slot = 8\n" in text and "slot = 30\n" in text, "who defines this again has them where they are"


@pytest.mark.parametrize("start", [True, False])
def test_slots_in_the_file_alone(running, start):
    """A domain that was merely started is another thing than its file."""
    running.add("web", rest=TWO + f"[disk vda]\nsource = {running.root}/a.img\n")
    open(f"{running.root}/a.img", "w").close()
    if start:
        running.post("web", "start")
    running.post("web", "interfaces", settings={"type": "user", "mac": FOURTH}, config=True)
    disks = running.get("web", "config", inactive=1)["config"]["disks"]
    assert disks[0]["slot"] == 3 and slots(running) == {MAC: None, OTHER: None, FOURTH: None}
    running.post("web", "interfaces", "detach", interface=MAC, config=True)
    assert slots(running) == {OTHER: 2, FOURTH: None}, "3 is the disk's, so 4 comes next as before"
    assert not start or slots(running, live=True) == {MAC: None, OTHER: None}


def test_a_guest_that_keeps_its_card_and_the_file(host):
    host.patient = False
    host.start()
    host.add("web", "keeps-cards", rest=TWO)
    host.post("web", "start")
    assert host.post("web", "interfaces", "detach", interface=MAC, persistent=True)["warnings"]
    assert slots(host) == {OTHER: 2} and slots(host, live=True) == {MAC: None, OTHER: None}


def test_a_card_that_is_attached_in_two_steps(running):
    running.add("web", rest=USER)
    running.post("web", "start")
    for where in ("live", "config"):
        running.post("web", "interfaces", settings={"type": "user", "mac": OTHER}, **{where: True})
    assert slots(running) == {MAC: None, OTHER: 8}


def test_a_card_that_goes_while_no_daemon_hears_of_it_moves_none(host):
    host.start()
    host.add("web", rest=TWO)
    host.post("web", "start")
    host.kill()
    host.told("web", "detach-device", device="net0")
    host.start()
    assert slots(host, live=True) == {OTHER: 2} and slots(host) == {MAC: None, OTHER: None}


def test_a_domain_of_an_older_version_has_no_slots(running):
    running.add("web", "knows-no-slot", rest=TWO)
    running.post("web", "start")
    running.kill()
    Path(running.paths.records, "web.json").write_text(json.dumps({**running.records()["web"], "version": "0.0"}))
    running.start()
    made = running.post("web", "interfaces", settings={"type": "user"}, persistent=True)["interface"]["mac"]
    assert slots(running)[made] == 8 and slots(running, live=True)[made] is None
    running.post("web", "interfaces", "detach", interface=MAC, persistent=True)
    assert slots(running) == {OTHER: 2, made: 8} and slots(running, live=True) == {OTHER: None, made: None}
    with pytest.raises(errors.Unsupported, match=r"a version of kvmapp that does not know of all that this asks for: .*unknown key"):
        running.post("web", "interfaces", settings={"type": "user", "slot": "30"}, live=True)


def test_in_the_file_of_a_machine_without_pci_cards_have_no_slots(running):
    running.add("web", machine="microvm", rest=TWO)
    running.post("web", "interfaces", "detach", interface=MAC)
    assert slots(running) == {OTHER: None}


def slots(host, live=False):
    """By MAC address, in the file or of the running domain."""
    return {mac: card["slot"] for mac, card in cards(host, inactive=not live).items()}


def test_a_guest_that_keeps_its_card_is_told_of(host):
    host.patient = False
    host.start()
    host.add("web", "keeps-cards", rest=USER)
    host.post("web", "start")
    answer = host.post("web", "interfaces", "detach", interface=MAC)
    assert answer["warnings"] == [f"the guest has not let go of interface 0 ({MAC}) yet; a guest without ACPI hotplug never does"]
    assert MAC in cards(host)


def test_which_card_is_meant(running):
    running.add("web", rest=USER + "[interface 1]\ntype = user\nmac = 52:54:00:00:00:02\n")
    with pytest.raises(errors.UsageError) as caught:
        running.post("web", "interfaces", "detach", type="user")
    assert str(caught.value) == "Domain has 2 interfaces. Please specify which one to detach using --mac"
    with pytest.raises(errors.UsageError, match="No interface with MAC address 52:54:00:00:00:77 was found"):
        running.post("web", "interfaces", "detach", type="user", interface="52:54:00:00:00:77")
    running.post("web", "interfaces", "detach", type="user", interface="52:54:00:00:00:02")
    assert list(cards(running)) == [MAC]


def test_a_card_of_the_file_is_no_other_than_the_running_domains(running):
    """Those that were attached to one of the two alone have one index."""
    running.add("web", uuid=UUID)
    running.post("web", "start")
    live = running.post("web", "interfaces", settings={"type": "user", "mac": "52:54:00:00:00:07"}, live=True)["interface"]
    config = running.post("web", "interfaces", settings={"type": "user", "mac": "52:54:00:00:00:08"}, config=True)["interface"]
    assert live["index"] == config["index"] == 0
    before = running.file("web").read_text()
    for where in {"live": True, "config": True}, {"persistent": True}:
        with pytest.raises(errors.UsageError) as caught:
            running.post("web", "interfaces", "detach", type="user", **where)
        assert str(caught.value) == "No interface with MAC address 52:54:00:00:00:07 was found in the domain's file"
    assert running.file("web").read_text() == before and list(cards(running)) == ["52:54:00:00:00:07"]


def test_the_cable_live_and_in_the_file(running):
    running.add("web", rest=USER)
    running.post("web", "start")
    running.post("web", "interfaces", "update", interface=MAC, settings={"link": "down"})
    assert running.told("web", "test_links") == {"net0": False}
    assert (cards(running)[MAC]["link"], cards(running, inactive=True)[MAC]["link"]) == ("down", "up")
    running.post("web", "interfaces", "update", interface=MAC, settings={"link": "down"}, config=True)
    assert "link = down" in running.file("web").read_text()
    running.post("web", "interfaces", "update", interface=MAC, settings={"link": ""}, config=True, live=True)
    assert running.told("web", "test_links") == {"net0": True} and cards(running, inactive=True)[MAC]["link"] == "up"


@pytest.mark.parametrize(("settings", "words"), [
    ({"colour": "red"}, "unknown key"), ({"type": "carrier-pigeon"}, "expected"), ({"type": "bridge"}, "has no source"),
    ({"type": "user", "mac": MAC}, "has it already"), ({"type": "user", "in_average": "5"}, "only the types bridge and network"),
    ({"type": "bridge", "source": "br0", "in_average": "5", "in_peak": "4"}, "less than in_average"),
    ({"type": "bridge", "source": "br0", "addresses": "1.2.3.4"}, "of no use without filter"),
    ({"type": "bridge", "source": "br0", "vlan": "4095"}, "expected"), ({"type": "user", "filter": "clean-traffic"}, "only the types")])
def test_cards_that_cannot_be_change_nothing(running, settings, words):
    running.add("web", uuid=UUID, rest=USER)
    before = running.file("web").read_text()
    with pytest.raises(errors.KvmappError, match=words):
        running.post("web", "interfaces", settings=settings)
    assert running.file("web").read_text() == before


def test_what_cannot_change_while_it_runs(running):
    running.add("web", rest=USER)
    running.post("web", "start")
    with pytest.raises(errors.Unsupported, match="Cannot change mac of interface 0 while domain 'web' runs"):
        running.post("web", "interfaces", "update", interface=MAC, settings={"mac": "52:54:00:00:00:02"}, live=True, config=True)
    assert list(cards(running, inactive=True)) == [MAC]


def test_a_domain_that_refuses_keeps_what_it_had(running):
    running.add("web", "no-hotplug", rest=USER)
    running.post("web", "start")
    with pytest.raises(errors.KvmappError, match="no slot is free"):
        running.post("web", "interfaces", settings={"type": "user"}, persistent=True)
    assert list(cards(running)) == [MAC] and list(cards(running, inactive=True)) == [MAC]
    with pytest.raises(errors.KvmappError, match=r"there is no such bridge|such device"):
        running.post("web", "interfaces", settings={"type": "bridge", "source": "br77"})


def test_two_running_domains_never_have_one_mac(running):
    running.add("web", rest=USER)
    running.add("twin", rest=USER.replace(":01", ":02"))
    running.post("web", "start")
    running.post("twin", "start")
    with pytest.raises(errors.NameInUse, match=f"Domain 'web' runs with the same MAC address {MAC}"):
        running.post("twin", "interfaces", settings={"type": "user", "mac": MAC})


def test_a_domain_that_knows_no_such_verb(running):
    running.add("web", "old", rest=USER)
    running.post("web", "start")
    for parts, body in (("interfaces",), {"settings": {"type": "user"}}), (("interfaces", "detach"), {"type": "user"}):
        with pytest.raises(errors.Unsupported, match="cannot come and go while domain") as caught:
            running.post("web", *parts, **body)
        assert caught.value.hint == "with --config it takes effect at the next start"
    assert list(cards(running)) == [MAC]


def attach_while(host, do, **body):
    """Attaches a card to a domain that stands still until `do` has been called."""
    pid = host.domain("web")["pid"]
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor() as clients:
        try:
            attached = clients.submit(host.post, "web", "interfaces", settings={"type": "user", "mac": "52:54:00:00:00:07"}, **body)
            host.eventually(lambda: host.domain("web")["job"], "the job")
            do()
        finally:
            os.kill(pid, signal.SIGCONT)
        return attached.result()


def test_a_file_that_is_changed_while_a_card_is_attached_keeps_the_change(running):
    running.add("web", uuid=UUID, rest=USER)
    running.post("web", "start")
    attach_while(running, lambda: running.add("web", uuid=UUID, rest=USER + "link = down\n", title="Ann"), persistent=True)
    assert cards(running, inactive=True)[MAC]["link"] == "down" and "52:54:00:00:00:07" in cards(running, inactive=True)
    assert "title = Ann" in running.file("web").read_text()


def test_a_card_that_goes_while_another_comes_is_gone(running):
    running.add("web", uuid=UUID, rest=USER)
    running.post("web", "start")
    asking = []
    attach_while(running, lambda: asking.append(running.tell("web", "detach-device", device="net0")))
    running.eventually(lambda: MAC not in cards(running), "the end of the card")
    assert list(cards(running)) == ["52:54:00:00:00:07"]
    asking[0].close()
