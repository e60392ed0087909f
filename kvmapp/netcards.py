"""Network cards, each made from its [interface] section with the host's side that belongs to it; at the start or later.

machine.py puts them into slots. Descriptors that others opened come in `files`, under their names there (cardfiles.py).
"""
from kvmapp.cardfiles import close_all, file_name, open_vhost
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
    vhost = [fd for pair in range(interface.queues) if (fd := files.pop(file_name("vhost", interface.index, pair), -1)) >= 0]
    try:
        if len(vhost) < interface.queues:
            close_all(vhost)
            vhost += open_vhost(interface)
        device = VirtioNet(card_name(interface), memory, backends, mac_bytes(interface), mtu=interface.mtu or 0,
                           link=interface.link == "up", vhost=vhost)
    finally:
        close_all(vhost)                                             # what the card has not taken
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
    if file_name("interface", interface.index) not in files and interface.type != "tap":
        raise Unsupported(f"Interface {interface.index} of type {interface.type} needs the daemon",
                          "with kvmapp run, use --net tap=NAME or --net user")
    for pair in range(interface.queues):
        fd = files.pop(file_name("interface", interface.index, pair), None)
        try:
            backends.append(Tap(interface.target) if fd is None else Tap(fd=fd))
        except HostError as error:
            if pair == 0:
                raise
            raise HostError(f"Cannot open queue {pair + 1} of {interface.queues} of tap '{interface.target}': {error.message}",
                            "make it with multi_queue: ip tuntap add NAME mode tap vnet_hdr multi_queue") from None
