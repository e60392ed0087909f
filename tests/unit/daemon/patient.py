"""The daemon as most tests start it: it waits longer for others than users would have it, for a machine that runs tests may stall for
seconds, and a domain that was stalled is none that does not answer.
"""
from kvmapp import fileserver
from kvmapp.daemon import actions, diskverbs, dnsmasq, plugging, process, starting, store, supervisor
from kvmapp.daemon.main import main
from kvmapp.daemon.process import DomainProcess

LONG = 60.0                             # seconds
STILL = 30.0                            # of a file that somebody writes; those that tests add are older

__all__ = ["main"]


async def ask_patiently(one, verb, timeout=LONG, **more):
    return await ask(one, verb, None if timeout is None else LONG, **more)


ask = DomainProcess.ask
DomainProcess.ask = ask_patiently                       # type: ignore[method-assign, assignment]
store.SETTLED = STILL
for module, name in ((actions, "DESTROY_GRACE"), (actions, "DESTROY_TIMEOUT"), (diskverbs, "PATIENCE"), (dnsmasq, "STOP_PATIENCE"),
                     (plugging, "ATTACH_TIMEOUT"), (plugging, "EJECT_PATIENCE"), (process, "LAST_BREATH"), (fileserver, "PATIENCE"),
                     (starting, "LAST_WORDS"), (supervisor, "STATUS_GRACE")):
    assert hasattr(module, name)
    setattr(module, name, LONG)
