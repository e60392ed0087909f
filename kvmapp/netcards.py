"""Network cards, each made from its [interface] section with the host's side that belongs to it; at the start or later.

machine.py puts them into slots. Descriptors that others opened come in `files`, under the names that `file_name` gives.
"""
import os

from kvmapp.errors import HostError, Unsupported
from kvmapp.iothread import IoThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import InterfaceConfig
    from kvmapp.hw.e1000 import E1000
    from kvmapp.net.backend import NetBackend
    from kvmapp.virtio.net import VirtioNet


def card_name(interface: "InterfaceConfig") -> str:
    """What logs, statistics and the control socket call the card of this section."""
    return f"net{interface.index}"


def file_name(interface: "InterfaceConfig", pair: int = 0, kind: str = "interface") -> str:
    """The key of a descriptor of this card's: `interface:1` is its tap, `interface:1.2` the tap's third queue, `vhost:1.2` an open
    /dev/vhost-net for that one. daemon/taps.py names them so, too."""
    return f"{kind}:{interface.index}" + (f".{pair}" if pair else "")


def make_device(interface: "InterfaceConfig", files: dict[str, int], memory) -> "tuple[VirtioNet | E1000, list[IoThread]]":
    """The card, not in a slot yet, and the threads that do its I/O, one a pair of queues, which do not run yet. Raises KvmappError.

    What it uses of `files` is taken out.
    """
    threads: list[IoThread] = []
    backends: list[NetBackend] = []
    try:
        open_backends(interface, files, backends)
        for pair in range(interface.queues):
            threads.append(IoThread(f"net {interface.index}" + (f".{pair}" if interface.queues > 1 else "")))
        make = make_e1000 if interface.model == "e1000" else make_virtio
        return make(interface, files, memory, backends, threads), threads
    except BaseException:
        for thread in threads:
            thread.close()
        for backend in backends:
            backend.close()
        raise


def make_virtio(interface: "InterfaceConfig", files: dict[str, int], memory, backends: list, threads: list[IoThread]) -> "VirtioNet":
    from kvmapp.virtio.net import VirtioNet
    device = VirtioNet(card_name(interface), memory, backends, mac_bytes(interface), mtu=interface.mtu or 0,
                       link=interface.link == "up", vhost=open_vhost(interface, files))
    for pair, thread in enumerate(threads):
        device.run_on(thread, [2 * pair, 2 * pair + 1])
    device.run_on(threads[0], [2 * interface.queues])                # the control queue
    return device


def make_e1000(interface: "InterfaceConfig", _files: dict[str, int], memory, backends: list, threads: list[IoThread]) -> "E1000":
    from kvmapp.hw.e1000 import E1000
    device = E1000(card_name(interface), memory, backends[0], mac_bytes(interface), link=interface.link == "up")
    device.run_on(threads[0])
    return device


def mac_bytes(interface: "InterfaceConfig") -> bytes:
    return bytes.fromhex(interface.mac.replace(":", ""))


def open_backends(interface: "InterfaceConfig", files: dict[str, int], backends: "list[NetBackend]") -> None:
    """The other ends of a card's cable, one a pair of queues, added to `backends`."""
    if interface.type == "user":
        from kvmapp.net.user import UserNet  # brings libslirp and glib
        backends.append(UserNet(forwards=interface.forwards))
        return
    from kvmapp.net.tap import Tap
    if file_name(interface) not in files and interface.type != "tap":
        raise Unsupported(f"Interface {interface.index} of type {interface.type} needs the daemon",
                          "with kvmapp run, use --net tap=NAME or --net user")
    for pair in range(interface.queues):
        fd = files.pop(file_name(interface, pair), None)
        try:
            backends.append(Tap(interface.target) if fd is None else Tap(fd=fd))
        except HostError as error:
            if pair == 0:
                raise
            raise HostError(f"Cannot open queue {pair + 1} of {interface.queues} of tap '{interface.target}': {error.message}",
                            "make it with multi_queue: ip tuntap add NAME mode tap vnet_hdr multi_queue") from None


def open_vhost(interface: "InterfaceConfig", files: dict[str, int]) -> list[int]:
    """An open /dev/vhost-net a pair of queues, or none. `vhost = auto` takes what the host has."""
    handed = [files.pop(file_name(interface, pair, "vhost"), -1) for pair in range(interface.queues)]
    if interface.vhost == "no" or interface.type == "user":
        return []
    if -1 not in handed:
        return handed
    opened: list[int] = []
    try:
        while len(opened) < interface.queues:
            opened.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        for fd in opened:
            os.close(fd)
        if interface.vhost == "yes":
            raise HostError(f"Cannot open /dev/vhost-net for interface {interface.index}: {error.strerror}",
                            "modprobe vhost_net, and run as root; or set vhost = auto") from None
        return []
    return opened
