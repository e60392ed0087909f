"""Where a domain runs and what it may take of the host: vcpupin, emulatorpin, numatune, schedinfo, memtune.

One route shows, one changes; what is changed comes as headings, keys and texts of a domain's file and is checked as a file is. Of a
running domain, its process moves its threads (vmprocess.verb_tune) and control groups are written here; its memory stays where it is.
"""
from __future__ import annotations

import asyncio
import os

from kvmapp import schema
from kvmapp.config import DomainConfig
from kvmapp.cpuset import ranges
from kvmapp.daemon.actions import change_stored, scope
from kvmapp.daemon.call import Call
from kvmapp.daemon.counters import vcpu_numbers
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.limits import Tunables, group_limits, vcpu_limits
from kvmapp.daemon.netverbs import parsed
from kvmapp.daemon.plugging import configs, set_live
from kvmapp.errors import ConfigError, HostError, KvmappError, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SECTIONS = {kind: schema.DOMAIN.sections[kind] for kind in ("cputune", "vcpu", "numatune", "memtune")}
PROCESS_SECTIONS = ("cputune", "vcpu_pins", "memtune")          # what the domain process may be told of


# Looking.

async def tuning(call: Call) -> dict:
    """Of a running domain, CPUs as the kernel has them; of a file, as it says, and all of the host's where it says nothing."""
    domain = call.domain()
    running = domain.process is not None and not call.query.get("inactive")
    config = domain.live if running else domain.want_persistent()
    if config is None:
        raise Unsupported(f"Domain '{domain.name}' was started by another version, which this one does not understand")
    cputune, numa, memory = config.cputune, config.numatune, config.memtune
    vcpus, emulator = (live_places if running else file_places)(domain, config)
    return {"vcpus": [{"number": number, "cpus": cpus} for number, cpus in enumerate(vcpus)], "emulator": emulator,
            "numa_mode": numa.mode if numa else "strict", "numa_nodeset": numa.nodeset if numa else "",
            "cpu_shares": cputune.shares, "vcpu_period": cputune.period, "vcpu_quota": cputune.quota,
            "global_period": cputune.global_period, "global_quota": cputune.global_quota,
            "hard_limit": memory.hard_limit, "soft_limit": memory.soft_limit, "swap_hard_limit": memory.swap_hard_limit}


def file_places(_domain: Domain, config: DomainConfig) -> tuple[list[str], str]:
    everywhere = ranges(sorted(os.sched_getaffinity(0)))
    rest = config.cputune.cpuset or everywhere
    pins = {pin.index: pin.cpuset for pin in config.vcpu_pins}
    return [pins.get(number, rest) for number in range(config.vcpus)], config.cputune.emulatorpin or rest


def live_places(domain: Domain, config: DomainConfig) -> tuple[list[str], str]:
    vcpus, emulator = file_places(domain, config)
    pid = domain.process.pid if domain.process else 0
    threads = vcpu_numbers(pid) if pid else {}
    return [affinity(threads.get(number, 0), cpus) for number, cpus in enumerate(vcpus)], affinity(pid, emulator)


def affinity(thread: int, otherwise: str) -> str:
    try:
        return ranges(sorted(os.sched_getaffinity(thread))) if thread else otherwise
    except OSError:                     # it has just ended
        return otherwise


# Changing.

async def tune(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("tune", call.who):
        live, config = scope(call, domain)
        settings = call.body.get("settings", {})
        after = [with_settings(one, settings) for one in configs(domain, live, config)]
        if live:
            await tune_live(call, domain, after[0])
        if config:
            change_stored(call, domain, lambda stored: sections_of(with_settings(stored, settings)))
    return call.changed(domain, list(after[0].warnings))


def sections_of(config: DomainConfig) -> dict[str, object]:
    """Those that tune."""
    data = config.to_dict()
    return {section.attribute: data[section.attribute] for section in SECTIONS.values()}


def with_settings(config: DomainConfig, settings: dict[str, dict[str, str]]) -> DomainConfig:
    """The configuration with these texts in it; an empty one is the default, and a section without what it needs is gone."""
    data: dict[str, Any] = config.to_dict()
    for heading, texts in settings.items():
        kind, _, word = heading.partition(" ")
        section = SECTIONS.get(kind)
        if section is None:
            raise ConfigError(f"[{heading}] is no section that tunes", f"these do: {', '.join(one.shape for one in SECTIONS.values())}")
        values = parsed(section, word, texts)
        values = {key: section.settings[key].default if value is None else value for key, value in values.items()}
        if section.word:
            data[section.attribute] = with_part(section, data[section.attribute], word, values)
        else:
            merged = {**(data[section.attribute] or {}), **values}
            data[section.attribute] = merged if is_whole(section, merged) else None
    return DomainConfig.from_dict(data)


def with_part(section: schema.Section, parts, word: str, values: dict) -> list[dict]:
    assert section.word
    try:
        index = section.word.kind.parse(word)
    except ValueError as error:
        raise ConfigError(f"[{section.kind} {word}] is no heading: expected {section.shape}, {error}") from None
    old = next((part for part in parts if part[section.word.key] == index), {section.word.key: index})
    new = {**old, **values}
    others = [part for part in parts if part[section.word.key] != index]
    return [*others, new] if is_whole(section, new) else others


def is_whole(section: schema.Section, values: dict) -> bool:
    return all(values.get(key) is not None for key, setting in section.settings.items() if setting.required)


async def tune_live(call: Call, domain: Domain, after: DomainConfig) -> None:
    """Limits first, for the host may refuse them; then the process. Raises KvmappError."""
    process, before = domain.want_active(), domain.live
    assert before
    if after.numatune != before.numatune:
        raise Unsupported("Requested operation is not valid: can't change numatune for running domain",
                          "the memory that the guest has stays on its nodes; with --config it takes effect at the next start")
    await limit(call, domain, before, after)
    sections = after.to_dict()
    try:
        await domain.told(process.ask("tune", settings={name: sections[name] for name in PROCESS_SECTIONS}), "Its threads cannot be moved")
    except KvmappError:
        await limit(call, domain, after, before)
        raise
    domain.want_active()
    assert domain.live                  # its cards may be others by now
    set_live(domain, DomainConfig.from_dict({**domain.live.to_dict(), **{name: sections[name] for name in PROCESS_SECTIONS}}))


async def limit(call: Call, domain: Domain, before: DomainConfig, after: DomainConfig) -> None:
    """Raises HostError for what this host does not keep."""
    groups, process, name = call.supervisor.cgroups, domain.want_active(), domain.name
    new, old = Tunables(after), Tunables(before)
    group, vcpu = group_limits(new, old, groups.unified), vcpu_limits(new, old, groups.unified)
    if not group and not vcpu:
        return

    def work() -> list[str]:
        groups.join(name, process.pid)
        return groups.limit(name, group) + groups.limit_vcpus(name, vcpu_numbers(process.pid), vcpu)

    if complaints := await asyncio.to_thread(work):
        raise HostError("; ".join(complaints), "with --config it is tried again at the next start")
