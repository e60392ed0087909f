"""The verbs that only look, one function a route (routes.py).

None takes a job or waits for one. Where a domain process is asked (counters), what it does not tell in a moment is answered from
the last that it told, with its age.
"""
from __future__ import annotations

import asyncio
import os
import platform

from kvmapp import __version__, hostinfo, runtime, schema
from kvmapp.daemon import domainlog
from kvmapp.daemon.actions import digest, render_anew
from kvmapp.daemon.call import Call
from kvmapp.daemon.counters import empty_stats, running_stats, vcpu_places
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.process import resident_of
from kvmapp.daemon.shapes import STATES
from kvmapp.errors import KvmappError, UsageError
from kvmapp.settings import is_ahead

API_VERSION = 1
LOG_LINES = 200


# The daemon and the host.

async def version(_call: Call) -> dict:
    return {"kvmapp": __version__, "api": API_VERSION, "python": platform.python_version(), "kernel": os.uname().release}


async def daemon(call: Call) -> dict:
    supervisor, paths = call.supervisor, call.supervisor.paths
    domains = supervisor.listed()
    return {"pid": os.getpid(), "version": runtime.IDENTITY, "started": call.daemon.started, "access": call.access,
            "resident": resident_of(os.getpid()) or 0, "zygote": supervisor.zygote.pid, "config_dir": paths.config,
            "run_dir": paths.run, "log_dir": paths.log, "state_dir": paths.state,
            "domains": {"defined": sum(domain.stored is not None for domain in domains),
                        "running": sum(domain.active for domain in domains),
                        "broken": sum(domain.stored is not None and domain.stored.error is not None for domain in domains)},
            "jobs": [{"domain": domain.name, "job": domain.jobs.current.to_dict()} for domain in domains if domain.jobs.current],
            "autostart": call.daemon.autostart.to_dict(), "warnings": supervisor.store.warnings + call.daemon.warnings}


async def reload(call: Call) -> dict:
    call.daemon.reload()
    supervisor = call.supervisor
    return {"domains": len(supervisor.domains),
            "broken": [name for name, stored in supervisor.store.files.items() if stored.error],
            "refused": call.daemon.refused, "warnings": supervisor.store.warnings + call.daemon.warnings}


async def autostart_status(call: Call) -> dict:
    return call.daemon.autostart.to_dict()


async def autostart_stop(call: Call) -> dict:
    return {"left": call.daemon.autostart.stop()}


async def node(_call: Call) -> dict:
    return hostinfo.node_info()


async def node_cpustats(call: Call) -> dict:
    times = hostinfo.cpu_times()
    wanted = call.query.get("cpu")
    if wanted is not None:
        times = [one for one in times if one["number"] == wanted]
        if not times:
            raise UsageError(f"Invalid cpuNum in virHostCPUGetStats: this host has no CPU {wanted}")
    elif not call.query.get("all"):
        times = times[:1]
    return {"cpus": times}


async def node_memstats(_call: Call) -> dict:
    return hostinfo.memory_figures()


async def capabilities(_call: Call) -> dict:
    blocks, info, cells = hostinfo.cpu_blocks(), hostinfo.node_info(), hostinfo.numa_cells()
    first = blocks[0] if blocks else {}
    memory = schema.DOMAIN.top.settings["memory"].kind
    return {
        "host": {"uuid": hostinfo.read_small("/sys/class/dmi/id/product_uuid") or None, "arch": info["model"],
                 "cpu": info["cpu_name"], "vendor": first.get("vendor_id", ""), "features": first.get("flags", "").split(),
                 "topology": {name: info[name] for name in ("sockets", "cores", "threads")}, "pages": page_sizes(),
                 "cells": cells, "virtualization": hostinfo.virtualization()},
        "guest": {"os_type": "hvm", "arch": "x86_64", "kvm": os.path.exists("/dev/kvm"),
                  "max_vcpus": getattr(schema.DOMAIN.top.settings["vcpus"].kind, "high", 0),
                  "max_memory": getattr(memory, "high", 0),
                  "devices": [kind for kind, section in schema.DOMAIN.sections.items() if not is_ahead(section.since)]}}


def page_sizes() -> list[int]:
    folder = "/sys/kernel/mm/hugepages"
    huge = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.sysconf("SC_PAGE_SIZE"), *sorted(int(name[len("hugepages-"):-len("kB")]) << 10 for name in huge)]


# Domains.

async def domains(call: Call) -> dict:
    return {"domains": [domain.summary() for domain in call.supervisor.listed()]}


async def domain(call: Call) -> dict:
    return call.domain().detail()


async def config(call: Call) -> dict:
    """The file's text with its comments; of a running domain, with what its live configuration has differently."""
    one = call.domain()
    live, stored = one.live, one.stored
    if live is not None and not call.query.get("inactive"):
        text = render_anew(live, call.supervisor.store.text(one.name) if stored and stored.config else "",
                           one.paths.domain_config(one.name))
        return {"text": text, "file": stored.path if stored else None, "config": live.to_dict(), "digest": digest(text)}
    if stored is None:
        one.want_persistent()
    text = call.supervisor.store.text(one.name)
    return {"text": text, "file": stored.path if stored else None,
            "config": stored.config.to_dict() if stored and stored.config else {}, "digest": digest(text)}


async def vcpus(call: Call) -> dict:
    one = call.domain()
    count = one.config.vcpus if one.config else 0
    return {"vcpus": vcpu_places(one.process.pid if one.process else 0, count)}


async def stats(call: Call) -> dict:
    return await stats_of(call.domain())


async def all_stats(call: Call) -> dict:
    chosen = [one for one in call.supervisor.listed() if one.active or call.query.get("all")]
    return {"domains": list(await asyncio.gather(*(stats_of(one) for one in chosen)))}


async def stats_of(one: Domain) -> dict:
    return await running_stats(one) if one.process is not None else empty_stats(one)


async def log(call: Call) -> dict:
    path = call.domain().paths.domain_log(call.domain().name)
    count = call.query.get("lines", LOG_LINES)
    if not 0 < count <= 100_000:
        raise UsageError(f"lines = {count}: expected a number from 1 to 100000")
    try:
        return {"file": path, "lines": await asyncio.to_thread(domainlog.last_lines, path, count)}
    except OSError as error:
        raise KvmappError(f"Cannot read '{path}': {error.strerror}") from None


async def wait(call: Call) -> dict:
    """Answers when the domain is in one of the states. A domain that is gone is shut off."""
    one = call.domain()
    wanted = {state.strip() for state in call.query.get("state", "shut off").split(",")}
    unknown = wanted.difference(STATES)
    if unknown:
        raise UsageError(f"state = '{unknown.pop()}': expected one of {', '.join(STATES)}")
    reached = await one.wait_until(lambda: one.state[0] in wanted, call.query.get("timeout"))
    return {"domain": one.summary(), "reached": reached}
