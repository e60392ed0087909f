"""The control socket's verbs for a running domain's devices.

    → {"verb": "link", "device": "net0", "up": false}          ← {"device": "net0", "up": false}
      plugs the cable of a network card in or out; the guest is told. `netN` is the card of [interface N].

Mixed into vmprocess.Domain, which says in which states the domain is.
"""
from kvmapp.errors import BadRequest, KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.machine import Machine


class DeviceNotFound(KvmappError):
    """The running domain has no device of this name."""
    code = "device-not-found"


class DeviceVerbs:
    machine: "Machine"

    def verb_link(self, _connection, request) -> dict:
        device, up = wanted(request, "device", str), wanted(request, "up", bool)
        self.card(device).set_link(up)
        return {"device": device, "up": up}

    def card(self, name: str):
        """The network card of that name."""
        cards = self.machine.network_cards()
        if name not in cards:
            raise DeviceNotFound(f"Domain '{self.machine.config.name}' has no network card '{name}'",
                                 f"it has: {', '.join(cards)}" if cards else "attach one, or add [interface 0] to its file")
        return cards[name]


def wanted(request: dict, key: str, kind: type):
    """An argument of this type. Raises BadRequest."""
    value = request.get(key)
    if type(value) is not kind:
        raise BadRequest(f"'{key}' is {value!r}, not a {kind.__name__}")
    return value
