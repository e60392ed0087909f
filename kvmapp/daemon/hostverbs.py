"""The verbs of the host's own network devices, one function a route (routes.py): iface-list, iface-bridge, iface-unbridge."""
from __future__ import annotations

import asyncio

from kvmapp.daemon import hostbridge
from kvmapp.daemon.call import Call
from kvmapp.errors import UsageError
from kvmapp.values import InterfaceName

CONFIRM_TIMEOUT = 30                    # seconds
UNTIL_BOOT = "this lasts until the host's next boot; write it into the distribution's network configuration, too"


async def interfaces(_call: Call) -> dict:
    return {"interfaces": await asyncio.to_thread(hostbridge.interfaces)}


async def interface_bridge(call: Call) -> dict:
    device, bridge = name(call.reference), name(call.body.get("bridge", ""))
    call.supervisor.bridging.want_none_pending()
    move = await asyncio.to_thread(hostbridge.bridging, device, bridge)
    timeout = seconds(call)
    await call.supervisor.bridging.make(f"bridge {bridge} with {device} in it", move, timeout)
    return {"bridge": bridge, "device": device, "timeout": timeout, "warnings": [*move.warnings, UNTIL_BOOT]}


async def interface_unbridge(call: Call) -> dict:
    bridge = name(call.reference)
    call.supervisor.bridging.want_none_pending()
    device, move = await asyncio.to_thread(hostbridge.unbridging, bridge)
    timeout = seconds(call)
    await call.supervisor.bridging.make(f"{device} out of bridge {bridge}", move, timeout)
    return {"bridge": bridge, "device": device, "timeout": timeout, "warnings": [*move.warnings, UNTIL_BOOT]}


async def interface_confirm(call: Call) -> dict:
    return {"what": await call.supervisor.bridging.confirm()}


async def interface_undo(call: Call) -> dict:
    return {"what": await call.supervisor.bridging.take_back()}


def seconds(call: Call) -> float:
    timeout = call.body.get("timeout", CONFIRM_TIMEOUT)
    if not 1 <= timeout <= 3600:
        raise UsageError(f"timeout = {timeout}: expected a number of seconds from 1 to 3600")
    return timeout


def name(text: str) -> str:
    try:
        return InterfaceName().parse(text)
    except ValueError as error:
        raise UsageError(f"{text!r} is no device's name: expected {error}") from None
