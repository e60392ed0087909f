"""Which addresses a card's filter lets it use, and whose filter stands on which tap when domains end and start meanwhile."""
import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from kvmapp.config import DomainConfig
from kvmapp.daemon import cardfilter, cards, cardverbs, dnsmasq, owners, ports
from kvmapp.daemon.network import ACTIVE, STOPPING, Network
from kvmapp.errors import HostError, NoResponse
from kvmapp.hostconfig import NetworkConfig

ANN, BOB = "52:54:00:00:00:01", "52:54:00:00:00:02"
LIVE = {"name": "default", "uuid": "d340f42e-8611-52c5-949c-8013181e73d4", "mode": "nat", "bridge": "virbr0", "mac": "52:54:00:00:00:09",
        "ipv4": {"address": "192.168.122.1/24", "dhcp": "192.168.122.2 - 192.168.122.254"}}


def card(mac, filter="clean-traffic", type="network", source="default", addresses=()):
    return SimpleNamespace(index=0, type=type, source=source, mac=mac, filter=filter, addresses=addresses, heading="interface 0", vlan=None,
                           in_average=None, out_average=None)


class Place:
    """A supervisor's part that Cards looks at: running domains by name, and a network that lends addresses."""

    def __init__(self, monkeypatch, tmp_path, ignores=True):
        self.state = tmp_path
        self.domains: dict[str, Any] = {}
        self.tables: dict[str, str] = {}                # of a tap: the MAC that its table names
        self.allowed: dict[str, tuple[set[str], bool]] = {}     # ... which addresses, and whether it learns them
        self.clock = time.time() + 60                   # what is written now is settled
        self.begin_daemon()
        monkeypatch.setattr(dnsmasq, "ignores_client_ids", lambda: ignores)
        monkeypatch.setattr(cardfilter, "tables", lambda: {f"kvmapp-{tap}" for tap in self.tables})
        monkeypatch.setattr(cardfilter, "apply", self.apply)
        monkeypatch.setattr(cardfilter, "remove", lambda tap: self.tables.pop(tap, None))
        monkeypatch.setattr(ports, "is_loose", lambda tap, bridge: False)
        self.closed: set[str] = set()                   # taps that are gone
        monkeypatch.setattr(cards.os.path, "exists", lambda path: path.rpartition("/")[2] not in self.closed)
        monkeypatch.setattr(dnsmasq.time, "time", lambda: self.clock)

    def begin_daemon(self, since=1.0):
        """One that finds the network active."""
        paths: Any = SimpleNamespace(network_run=str(self.state), network_state=str(self.state))
        store: Any = None
        self.network = Network("default", store, paths)
        self.network.take_note({"config": LIVE, "phase": ACTIVE, "since": since})
        supervisor: Any = SimpleNamespace(heartbeat=0, events=Mock(),
                                          active=lambda: list(self.domains.values()), run=lambda work, name: asyncio.ensure_future(work),
                                          networks=SimpleNamespace(networks={"default": self.network}))
        self.cards = cards.Cards(supervisor)

    def lend(self, owners, until=0):
        """What dnsmasq would write; 0 is without an end."""
        (self.state / "default.leases").write_text("".join(f"{until} {mac} {address} * *\n" for address, mac in owners.items()))

    def apply(self, heading, tap, mac, known, learns, *, new=False):
        self.tables[tap] = mac
        self.allowed[tap] = set(known), learns

    def begin(self, name, one, tap):
        self.domains[name] = SimpleNamespace(name=name, live=SimpleNamespace(interfaces=[one]), record=SimpleNamespace(taps={"0": tap}),
                                             plugging=set())

    def end(self, name):
        del self.domains[name]
        self.cards.release(name)

    def own(self, mac):
        one: Any = card(mac)
        return set(self.cards.known(one).addresses)


def test_an_address_stays_a_guests_own_until_another_has_it(monkeypatch, tmp_path):
    """A guest that was paused goes on with it when its lease has run out."""
    place = Place(monkeypatch, tmp_path)
    place.lend({"192.168.122.7": ANN})
    assert place.own(ANN) == {"192.168.122.7"} and place.own(BOB) == set()
    place.lend({})
    assert place.own(ANN) == {"192.168.122.7"}
    place.lend({"192.168.122.8": ANN})
    assert place.own(ANN) == {"192.168.122.7", "192.168.122.8"}
    place.lend({"192.168.122.7": BOB})
    assert place.own(ANN) == {"192.168.122.8"} and place.own(BOB) == {"192.168.122.7"}
    place.network.live = NetworkConfig.from_dict({**LIVE, "hosts": [{"name": "bob", "mac": BOB, "ipv4": "192.168.122.8"}]})
    assert place.own(ANN) == set() and place.own(BOB) == {"192.168.122.7", "192.168.122.8"}
    place.network.live, place.network.since = NetworkConfig.from_dict(LIVE), 2.0
    place.lend({})
    assert place.own(BOB) == set(), "a network that was started anew may have other ranges"


def test_of_many_addresses_the_last_ones_stay_a_guests_own(monkeypatch, tmp_path):
    place = Place(monkeypatch, tmp_path)
    place.lend({"192.168.122.250": BOB})
    assert place.own(BOB) == {"192.168.122.250"}
    for number in range(10, 50):
        place.lend({f"192.168.122.{number}": ANN, f"192.168.122.{number + 100}": ANN})
        assert {f"192.168.122.{number}", f"192.168.122.{number + 100}"} <= place.own(ANN)
    place.lend({})
    assert place.own(ANN) == {f"192.168.122.{number + more}" for number in range(42, 50) for more in (0, 100)}
    assert place.own(BOB) == {"192.168.122.250"}
    place.begin_daemon()
    assert len(place.own(ANN)) == owners.MOST_FORMER
    place.lend({"192.168.122.42": ANN})
    for number in range(10, 41):                            # which it had, and has once more
        place.lend({"192.168.122.42": ANN, f"192.168.122.{number}": ANN})
        place.own(ANN)
    place.lend({})
    assert "192.168.122.40" in place.own(ANN)


def test_the_next_daemon_knows_what_was_lent(monkeypatch, tmp_path):
    """dnsmasq's file has only leases that have not run out."""
    place = Place(monkeypatch, tmp_path)
    place.lend({"192.168.122.7": ANN, "192.168.122.8": BOB})
    assert place.own(ANN) == {"192.168.122.7"}
    place.lend({"192.168.122.9": ANN})
    place.begin_daemon()
    assert place.own(ANN) == {"192.168.122.7", "192.168.122.9"} and place.own(BOB) == {"192.168.122.8"}
    place.begin_daemon()
    place.lend({"192.168.122.7": BOB})
    assert place.own(ANN) == {"192.168.122.9"} and place.own(BOB) == {"192.168.122.7", "192.168.122.8"}
    place.begin_daemon(since=2.0)
    assert place.own(BOB) == {"192.168.122.7"}, "the network was started anew"
    place.network.files.remove()
    assert [one.name for one in tmp_path.iterdir()] == ["default.leases"]
    place.network.phase = STOPPING
    place.lend({"192.168.122.8": BOB})
    assert "192.168.122.8" in place.own(BOB) and [one.name for one in tmp_path.iterdir()] == ["default.leases"]


@pytest.mark.parametrize("note", ["", "{}", "[]", '{"since": 1.0, "holders": []}', '{"since": 1.0}', '"since"', "\0"])
def test_a_note_that_cannot_be_read_is_none(monkeypatch, tmp_path, note):
    place = Place(monkeypatch, tmp_path)
    (tmp_path / "default.lent").write_text(note)
    place.lend({"192.168.122.7": ANN})
    assert place.own(ANN) == {"192.168.122.7"}
    place.begin_daemon()
    place.lend({})
    assert place.own(ANN) == {"192.168.122.7"}


def test_a_note_that_cannot_be_written_keeps_no_guest_from_its_address(monkeypatch, tmp_path, caplog):
    place = Place(monkeypatch, tmp_path)
    (tmp_path / "default.lent.new").mkdir()
    place.lend({"192.168.122.7": ANN})
    assert place.own(ANN) == place.own(ANN) == {"192.168.122.7"}
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once"


def test_where_dnsmasq_heeds_client_identifiers_a_running_guest_keeps_its_address(monkeypatch, tmp_path):
    place = Place(monkeypatch, tmp_path, ignores=False)
    place.begin("ann", card(ANN, filter="none"), "vnet0")
    place.begin("bob", card(BOB), "vnet1")
    place.lend({"192.168.122.7": ANN})
    assert place.own(BOB) == set()
    place.lend({"192.168.122.7": BOB})               # by ann's client identifier
    assert place.own(BOB) == set() and place.own(ANN) == {"192.168.122.7"}
    del place.domains["ann"]
    assert place.own(BOB) == {"192.168.122.7"}


def test_leases_are_read_when_their_file_changes_and_run_out_all_the_same(monkeypatch, tmp_path):
    """However many cards there are, and however often they are looked at."""
    place = Place(monkeypatch, tmp_path)
    read = Mock(wraps=dnsmasq.parse_leases)
    looked = Mock(wraps=place.network.lease_file.valid)
    monkeypatch.setattr(dnsmasq, "parse_leases", read)
    monkeypatch.setattr(place.network.lease_file, "valid", looked)
    for number in range(5):
        place.begin(f"d{number}", card(f"52:54:00:00:00:1{number}"), f"vnet{number}")
    place.lend({"192.168.122.7": ANN}, until=int(place.clock) + 10)
    place.network.live = NetworkConfig.from_dict({**LIVE, "hosts": [{"name": "bob", "mac": BOB, "ipv4": "192.168.122.7"}]})

    async def scenario():
        for _ in range(3):
            await place.cards.check()
    asyncio.run(scenario())
    assert (read.call_count, looked.call_count) == (1, 3)
    assert place.own(ANN) == {"192.168.122.7"}
    place.clock += 20
    assert place.own(ANN) == set() and read.call_count == 1, "it has run out, and is fixed to another"
    place.lend({"192.168.122.8": ANN})
    assert place.own(ANN) == {"192.168.122.8"} and read.call_count == 2


def test_a_file_that_was_just_written_may_change_under_the_same_time_stamp(monkeypatch, tmp_path):
    place = Place(monkeypatch, tmp_path)
    monkeypatch.setattr(dnsmasq, "status_key", lambda path: (0, int((place.clock - 1) * 1e9), 32, 7))
    place.lend({"192.168.122.7": ANN})
    assert place.own(ANN) == {"192.168.122.7"}
    place.lend({"192.168.122.8": ANN})
    assert "192.168.122.8" in place.own(ANN)


@pytest.mark.parametrize(("one", "follows"), [
    (card(ANN), True), (card(ANN, filter="none"), False), (card(ANN, addresses=["192.168.122.7"]), False),
    (card(ANN, type="bridge", source="br0"), False)])
def test_leases_are_waited_for_where_a_filter_goes_by_them(monkeypatch, tmp_path, one, follows):
    place = Place(monkeypatch, tmp_path)
    place.begin("ann", one, "vnet0")

    async def scenario():
        await place.cards.check()
        assert place.cards.follow_leases() is place.cards.woken.is_set() is follows
    asyncio.run(scenario())


@pytest.mark.parametrize("at", ["tables", "apply"])
def test_a_filter_is_not_put_onto_the_tap_of_another_domain(monkeypatch, tmp_path, at):
    """ann ends while a check is at work, and bob, who wants no filter, gets a tap of the same name."""
    place = Place(monkeypatch, tmp_path)
    held, go_on = threading.Event(), threading.Event()
    real = getattr(cardfilter, at)

    def hold(*words, **options):
        held.set()
        assert go_on.wait(60)
        return real(*words, **options)

    async def scenario():
        bob: Any = card(BOB, filter="none", type="bridge", source="br0")
        place.begin("ann", card(ANN), "vnet0")
        await place.cards.check()
        assert place.tables == {"vnet0": ANN}
        place.tables.clear()
        monkeypatch.setattr(cardfilter, at, hold)
        check = asyncio.create_task(place.cards.check())
        await asyncio.to_thread(held.wait, 60)
        place.end("ann")
        settled = asyncio.create_task(place.cards.settle("bob", bob, "vnet0", "br0"))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(check, settled)
        place.begin("bob", bob, "vnet0")
        await place.cards.check()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        assert place.tables == {} and place.cards.filters == {}
    asyncio.run(scenario())


def test_a_table_that_is_noted_for_a_tap_goes_with_the_next_card_of_that_name(monkeypatch, tmp_path):
    place = Place(monkeypatch, tmp_path)

    async def scenario():
        place.begin("ann", card(ANN), "vnet0")
        await place.cards.check()
        bob: Any = card(BOB, filter="none")
        await place.cards.settle("bob", bob, "vnet0", "virbr0")
        assert place.tables == {} and place.cards.filters == {}
    asyncio.run(scenario())


class LetGo:
    """A running domain with one filtered card, of which its process says that the guest has let go of it."""

    def __init__(self, monkeypatch, place):
        self.place = place
        monkeypatch.setattr(cards, "CLOSING", (0, 0, 0))
        config = DomainConfig.from_dict({"name": "ann", "memory": 64 << 20, "interfaces": [
            {"index": 0, "type": "network", "source": "default", "mac": ANN, "filter": "clean-traffic"}]})
        self.domain: Any = SimpleNamespace(name="ann", uuid="", id=1, paths=None, live=config, notify=Mock(), note=Mock(), outdated=False,
                                           plugging=set(), record=SimpleNamespace(taps={"0": "vnet0"}, disks=[]))
        place.domains["ann"] = self.domain

    async def say(self):
        await self.place.cards.check()
        assert self.place.tables == {"vnet0": ANN}
        self.place.cards.removed(self.domain, "net0")
        assert not self.domain.live.interfaces and not self.domain.record.taps


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def rounds(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_card_that_is_let_go_of_keeps_its_filter_as_long_as_its_tap_is_there(monkeypatch, tmp_path, caplog):
    place = Place(monkeypatch, tmp_path)

    async def story():
        place.lend({"192.168.122.7": ANN})
        let_go = LetGo(monkeypatch, place)
        await place.cards.check()
        place.cards.removed(let_go.domain, "0")             # no name of a device
        assert let_go.domain.record.taps == {"0": "vnet0"} and place.allowed == {"vnet0": ({"192.168.122.7"}, False)}
        await let_go.say()
        await until(lambda: place.allowed == {"vnet0": (set(), False)})     # its addresses may be another's soon
        await place.cards.check()
        assert place.tables == {"vnet0": ANN}
        assert "domain 'ann' has let go of a card and keeps its tap vnet0: the tap's filter stays" in caplog.text
        place.closed.add("vnet0")
        await gone(place)
        assert caplog.text.count("keeps its tap") == 1
    asyncio.run(story())


def test_and_no_longer_than_its_domain(monkeypatch, tmp_path):
    place = Place(monkeypatch, tmp_path)

    async def story():
        await LetGo(monkeypatch, place).say()
        await rounds()
        place.end("ann")
        await gone(place)
        assert len(asyncio.all_tasks()) == 1
    asyncio.run(story())


async def gone(place):
    while place.tables or place.cards.filters:
        await asyncio.sleep(0.001)
    await rounds()


@pytest.mark.parametrize("filter", ["clean-traffic", "none"])
def test_a_tap_of_that_name_is_another_cards_then(monkeypatch, tmp_path, filter):
    place = Place(monkeypatch, tmp_path)
    monkeypatch.setattr(ports, "settle", lambda one, tap, bridge, known: place.tables.update({tap: one.mac} if filter != "none" else {}))

    async def story():
        await LetGo(monkeypatch, place).say()
        bob: Any = card(BOB, filter=filter)
        await place.cards.settle("bob", bob, "vnet0", "virbr0")
        place.begin("bob", bob, "vnet0")
        await rounds()
        assert place.tables == ({"vnet0": BOB} if filter != "none" else {})
        assert len(asyncio.all_tasks()) == 1, "nobody waits for the first one's tap any more"
    asyncio.run(story())


def test_a_card_that_is_let_go_of_while_a_check_is_at_work_keeps_its_filter(monkeypatch, tmp_path):
    """A domain process may say so at the very moment in which nft is at work."""
    place = Place(monkeypatch, tmp_path)
    let_go = LetGo(monkeypatch, place)

    def apply(heading, tap, mac, known, learns, *, new=False):
        place.apply(heading, tap, mac, known, learns)
        asyncio.run_coroutine_threadsafe(say(), loop).result(60)

    async def say():
        place.cards.removed(let_go.domain, "net0")
    loop = asyncio.new_event_loop()
    monkeypatch.setattr(cardfilter, "apply", apply)

    async def story():
        await place.cards.check()                           # the first one after the daemon's start: nothing is noted yet
        assert not let_go.domain.record.taps and place.tables == {"vnet0": ANN}
        await rounds()
        await place.cards.check()
        assert place.tables == {"vnet0": ANN}
        place.closed.add("vnet0")
        await gone(place)
    loop.run_until_complete(story())
    loop.close()


class Attached:
    """A domain without cards that gets one with a filter; `process` is its process."""

    def __init__(self, monkeypatch, place, process):
        monkeypatch.setattr(cards, "CLOSING", (0, 0, 0))
        self.place = place
        section = {"index": 0, "type": "network", "source": "default", "mac": ANN, "filter": "clean-traffic"}
        config = DomainConfig.from_dict({"name": "ann", "memory": 64 << 20})

        async def told(work, _cannot):
            return await work
        self.domain: Any = SimpleNamespace(name="ann", uuid="", id=1, live=config, notify=Mock(), note=Mock(), outdated=False,
                                           plugging=set(), record=SimpleNamespace(taps={}, disks=[], config={}), told=told,
                                           want_active=lambda: process)
        place.domains["ann"] = self.domain
        tap = SimpleNamespace(made=True, name="vnet0", files=lambda _: {}, close=lambda: None)
        monkeypatch.setattr(cardverbs, "open_tap", lambda *_: tap)
        monkeypatch.setattr(ports, "settle", lambda card, tap, *_: place.tables.__setitem__(tap, card.mac))
        supervisor: Any = place.cards.supervisor
        supervisor.cards = place.cards
        supervisor.networks.bridge_of, supervisor.networks.expect = lambda _: "virbr0", lambda _: None
        self.call: Any = SimpleNamespace(supervisor=supervisor)
        self.after = DomainConfig.from_dict({**config.to_dict(), "interfaces": [section]})
        self.add = lambda slot: lambda known: [*known, {**section, "slot": slot}]

    async def plug(self):
        return await cardverbs.plug(self.call, self.domain, self.after, self.after.interfaces[0], self.add)

    def names(self):
        return [one.index for one in self.domain.live.interfaces], self.domain.record.taps


@pytest.mark.parametrize("error", [HostError("no, thanks"), NoResponse("Domain 'ann' does not answer")])
def test_a_card_that_was_not_taken_keeps_its_filter_as_long_as_its_tap_is_there(monkeypatch, tmp_path, error):
    """A domain process that says no, or nothing, may have the tap all the same."""
    place = Place(monkeypatch, tmp_path)

    async def refuse(*_, **_more):
        assert attached.names() == ([0], {"0": "vnet0"}), "it is noted before, for the next daemon"
        raise error

    async def status(*_):
        return {"devices": [{"name": "vda"}]}
    attached = Attached(monkeypatch, place, SimpleNamespace(ask_with_files=refuse, ask=status))

    async def story():
        with pytest.raises(type(error)):
            await attached.plug()
        await rounds()
        await place.cards.check()
        assert place.tables == {"vnet0": ANN} and attached.names() == ([], {})
        place.closed.add("vnet0")
        await gone(place)
    asyncio.run(story())


def test_a_card_that_was_taken_without_a_word_is_found(monkeypatch, tmp_path):
    place = Place(monkeypatch, tmp_path)
    answers = asyncio.Event()

    async def silence(*_, **_more):
        raise NoResponse("Domain 'ann' does not answer")

    async def status(*_):
        await answers.wait()
        return {"devices": [{"name": "net0", "slot": 9}]}
    attached = Attached(monkeypatch, place, SimpleNamespace(ask_with_files=silence, ask=status))

    async def story():
        with pytest.raises(NoResponse):
            await attached.plug()
        assert list(place.cards.running()) == [] and attached.domain.plugging == {"net0"}
        place.cards.compare(attached.domain, [])
        assert attached.names() == ([0], {"0": "vnet0"}), "that it is not there yet says nothing"
        answers.set()
        await rounds()
        assert place.tables == {"vnet0": ANN} and attached.names() == ([0], {"0": "vnet0"})
        assert attached.domain.live.interfaces[0].slot == 9 and not attached.domain.plugging
        told: Any = place.cards.supervisor.events.publish
        told.assert_called_once_with("device-added", "ann", uuid="", id=1, detail="net0")
    asyncio.run(story())
