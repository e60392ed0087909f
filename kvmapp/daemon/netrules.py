"""The packet filter's share of virtual networks: NAT, forwards, and who may reach whom.

    rules(networks)        what must hold, as plain rules in the order in which they are tried
    nft_text(rules)        the same as tables `ip kvmapp` and `ip6 kvmapp`, nft(8): ours alone, replaced as a whole in one step
    iptables_text(rules)   the same as chains KVMAPP-* for iptables-restore(8), where there is no nft

Other programs flush only what is theirs, and whatever becomes of ours, `apply` puts it back. In the kernel a packet passes only if
every table lets it: otherfilters.py knows the host's other ones, and iptables is told beside nft where it would drop what we let pass.
Left out: rules within a bridge (a guest that spoofs) and forwards from the host's own 127.0.0.1.
"""
from __future__ import annotations

import re
from contextlib import suppress
from functools import cache

from kvmapp.daemon import otherfilters
from kvmapp.daemon.hostnet import find_program, run
from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.hostconfig import ForwardConfig, NetworkConfig

# Conditions of a rule, by what they are called here: how nft and iptables say it. {} is the value; {ip} is ip or ip6.
CONDITIONS = {
    "in": ('iifname "{}"', "-i {}"), "not_in": ('iifname != "{}"', "! -i {}"),
    "out": ('oifname "{}"', "-o {}"), "not_out": ('oifname != "{}"', "! -o {}"),
    "src": ("{ip} saddr {}", "-s {}"), "not_src": ("{ip} saddr != {}", "! -s {}"),
    "dst": ("{ip} daddr {}", "-d {}"), "not_dst": ("{ip} daddr != {}", "! -d {}"),
    "local": ("fib daddr type local", "-m addrtype --dst-type LOCAL"),
    "answers": ("ct state established,related", "-m conntrack --ctstate ESTABLISHED,RELATED"),
    "forwarded": ("ct status dnat", "-m conntrack --ctstate DNAT"),
    "tcp": ("tcp dport {}", "-p tcp --dport {}"), "udp": ("udp dport {}", "-p udp --dport {}"),
}
# Chains: nft's hook, iptables' table and where it jumps from. The host's own input is iptables' matter only: an accept of ours
# means nothing to another nft table.
CHAINS = {"forward": ("type filter hook forward priority 0", "filter", "FORWARD"),
          "input": ("", "filter", "INPUT"),
          "prerouting": ("type nat hook prerouting priority -100", "nat", "PREROUTING"),
          "output": ("type nat hook output priority -100", "nat", "OUTPUT"),
          "postrouting": ("type nat hook postrouting priority 100", "nat", "POSTROUTING")}
MULTICAST = {4: ("224.0.0.0/24", "255.255.255.255"), 6: ("ff00::/8",)}
LOOPBACK = {4: "127.0.0.0/8", 6: "::1"}
VERDICTS = ("accept", "reject", "return", "masquerade")             # and dnat
SERVICES = (("udp", 67), ("udp", 547), ("udp", 53), ("tcp", 53))        # DHCP, DHCPv6, DNS

Rule = tuple[str, dict[str, object], str]           # chain, conditions, verdict: accept, reject, return, masquerade or dnat ADDRESS


def apply(networks: list[NetworkConfig]) -> str | None:
    """Makes the packet filter say this, whatever it said of ours before, and returns what it shows then (`shown`); None when somebody
    else changed that at the same moment. Raises HostError, and nothing is changed then.
    """
    if find_program("nft"):
        run(["nft", "-f", "-"], "set the rules of networks", "".join(nft_text(networks, version) for version in (4, 6)))
        apply_beside(networks)
    else:
        apply_iptables(networks)
    text = shown()
    return text if rules_in(text) == rules_wanted(networks) else None


def apply_iptables(networks: list[NetworkConfig]) -> None:
    for version, tool in ((4, "iptables"), (6, "ip6tables")):
        wanted = rules(networks, version)
        if not find_program(tool):
            if wanted:
                raise HostError("Cannot set the rules of networks: neither nft nor iptables is installed", "install nftables")
            continue
        if wanted:
            run([f"{tool}-restore", *waiting(tool, (1, 6, 2)), "--noflush"], "set the rules of networks", iptables_text(wanted))
        for chain, (_, table, base) in CHAINS.items():
            jump(tool, table, base, f"KVMAPP-{chain.upper()}", bool(wanted))


def apply_beside(networks: list[NetworkConfig]) -> None:
    """Where iptables' chains are closed, they call ours."""
    for chain in otherfilters.chains():
        wanted = [rule for rule in rules(networks, chain.version) if rule[0] == chain.name] if chain.is_closed else []
        if wanted:
            run([f"{chain.tool}-restore", *waiting(chain.tool, (1, 6, 2)), "--noflush"], "set the rules of networks",
                iptables_text(wanted, (chain.name,)))
        if wanted or chain.has_ours:
            jump(chain.tool, "filter", chain.base, f"KVMAPP-{chain.base}", bool(wanted))


def shown() -> str:
    """Our rules as the host's packet filter shows them now. What it showed after `apply` it shows until somebody touches them."""
    if find_program("nft"):
        return "".join(listed(["nft", "list", "table", family, "kvmapp"]) for family in ("ip", "ip6")) + otherfilters.marks()
    tools = [tool for tool in ("iptables-save", "ip6tables-save") if find_program(tool)]
    lines = [line for tool in tools for line in listed([tool]).splitlines()]
    return "\n".join(line for line in lines if line.startswith("-A") and "KVMAPP" in line)


def rules_in(text: str) -> int:
    """How many rules are shown."""
    lines = [line.strip() for line in text.splitlines()]
    return sum(line.startswith("-A") or line.endswith(VERDICTS) or " dnat to " in line for line in lines)


def rules_wanted(networks: list[NetworkConfig]) -> int:
    """How many there must be; with iptables, those that jump to our chains, too."""
    count = 0
    for version in (4, 6):
        wanted = rules(networks, version)
        if find_program("nft"):
            count += sum(bool(CHAINS[chain][0]) for chain, _, _ in wanted)
        elif wanted:
            count += len(wanted) + len(CHAINS)
    return count


def listed(words: list[str]) -> str:
    try:
        return run(words, "look at the rules")
    except HostError:                           # there are none
        return ""


def jump(tool: str, table: str, base: str, chain: str, wanted: bool) -> None:
    """Our chain is tried first, once; without networks it is gone."""
    what = "set the rules of networks"
    words = [tool, *waiting(tool, (1, 4, 21)), "-t", table]
    try:
        there = run([*words, "-S", base], what).splitlines().count(f"-A {base} -j {chain}")
    except HostError as error:
        if wanted or "xtables lock" in error.message:
            raise
        return                                  # a kernel without this table has nothing of ours in it
    if wanted and not there:
        run([*words, "-I", base, "1", "-j", chain], what)
    for _ in range(there - bool(wanted)):
        run([*words, "-D", base, "-j", chain], what)
    if not wanted:
        with suppress(HostError):               # there may be no such chain
            run([*words, "-F", chain], what)
            run([*words, "-X", chain], what)


@cache
def waiting(tool: str, since: tuple[int, ...]) -> list[str]:
    """For whoever else changes rules at this moment, some seconds; without this a lock that is held is an error."""
    found = re.search(r" v(\d+)\.(\d+)\.(\d+)", run([tool, "--version"], "look at the version of iptables"))
    return ["-w", "5"] if found and tuple(map(int, found.groups())) >= since else []


# What must hold.

def rules(networks: list[NetworkConfig], version: int) -> list[Rule]:
    """Of the networks that have addresses of this version of IP. `open` ones have no rules of ours."""
    found: list[Rule] = []
    ours = [(one, network) for one in networks if one.mode != "open" and (network := network_of(one, version))]
    found += [("forward", {"in": one.bridge, "out": one.bridge}, "accept") for one, _ in ours]
    for one, network in ours:
        found += leaving(one, network)
    for one, network in ours:
        found += arriving(one, network)
    found += [("forward", {"in": one.bridge}, "accept") for one, _ in ours if one.mode != "isolated"]
    found += [("input", {"in": one.bridge, protocol: port}, "accept") for one, _ in ours for protocol, port in SERVICES]
    for one, network in ours:
        for forward in one.forwards:
            found += forwarding(one, forward, version)
        if one.forwards:                # a guest that goes to its neighbour by the host's port: the answer must come back that way
            found.append(("postrouting", {"out": one.bridge, "src": network, "forwarded": True}, "masquerade"))
        if one.mode == "nat":
            found += translating(one, network, version)
    return found


def network_of(config: NetworkConfig, version: int) -> str | None:
    from kvmapp.hostconfig import subnets
    subnet = subnets(config).get(f"ipv{version}")
    return str(subnet.network) if subnet else None


def leaving(one: NetworkConfig, network: str) -> list[Rule]:
    if one.mode == "isolated":
        return [("forward", {"in": one.bridge}, "reject")]
    found: list[Rule] = [("forward", {"in": one.bridge, "not_src": network}, "reject")]
    if one.device:
        found.append(("forward", {"in": one.bridge, "not_out": one.device}, "reject"))
    return found


def arriving(one: NetworkConfig, network: str) -> list[Rule]:
    to: dict[str, object] = {"out": one.bridge}
    found: list[Rule] = [("forward", {**to, "not_in": one.device}, "reject")] if one.device else []
    if one.mode == "nat":
        found += [("forward", {**to, "answers": True}, "accept"), ("forward", {**to, "forwarded": True}, "accept")]
    elif one.mode == "route":
        found.append(("forward", {**to, "dst": network}, "accept"))
    return [*found, ("forward", to, "reject")]


def forwarding(one: NetworkConfig, forward: ForwardConfig, version: int) -> list[Rule]:
    target = address_of(one, forward.to, version)
    if target is None or (forward.listen is not None and (":" in forward.listen) != (version == 6)):
        return []
    port = forward.to_port or forward.port
    where: dict[str, object] = {"dst": forward.listen} if forward.listen else {"local": True}
    verdict = f"dnat [{target}]:{port}" if version == 6 else f"dnat {target}:{port}"
    return [("prerouting", {**where, forward.protocol: forward.port}, verdict),
            ("output", {**where, "not_dst": LOOPBACK[version], forward.protocol: forward.port}, verdict)]


def address_of(one: NetworkConfig, to: str, version: int) -> str | None:
    """Of a forward's target: an address, or a [host]'s."""
    for host in one.hosts:
        if host.name == to:
            return host.ipv4 if version == 4 else host.ipv6
    return to if (":" in to) == (version == 6) else None


def translating(one: NetworkConfig, network: str, version: int) -> list[Rule]:
    leaves: dict[str, object] = {"out": one.device} if one.device else {}
    found: list[Rule] = [("postrouting", {"src": network, "dst": group}, "return") for group in MULTICAST[version]]
    return [*found, ("postrouting", {**leaves, "src": network, "not_dst": network}, "masquerade")]


# How the two filters say it.

def nft_text(networks: list[NetworkConfig], version: int) -> str:
    """One transaction: the first line makes `delete` possible where there is no table yet."""
    table = f"table {'ip' if version == 4 else 'ip6'} kvmapp"
    lines = [table, f"delete {table}"]
    wanted = rules(networks, version)
    if networks and (wanted or version == 4):       # an empty one marks that nothing was flushed
        lines.append(f"{table} {{")
        for chain, (hook, _, _) in CHAINS.items():
            if hook:
                lines += [f"\tchain {chain} {{", f"\t\t{hook}; policy accept;"]
                lines += [f"\t\t{nft_rule(conditions, verdict, version)}" for name, conditions, verdict in wanted if name == chain]
                lines.append("\t}")
        lines.append("}")
    return "\n".join(lines) + "\n"


def nft_rule(conditions: dict[str, object], verdict: str, version: int) -> str:
    words = [CONDITIONS[name][0].format(value, ip="ip" if version == 4 else "ip6") for name, value in conditions.items()]
    return " ".join([*words, verdict.replace("dnat ", "dnat to ")])


def iptables_text(wanted: list[Rule], only: tuple[str, ...] = tuple(CHAINS)) -> str:
    lines = []
    for table in ("filter", "nat"):
        chains = [chain for chain, (_, where, _) in CHAINS.items() if where == table and chain in only]
        if not chains:
            continue
        lines += [f"*{table}", *(f":KVMAPP-{chain.upper()} - [0:0]" for chain in chains)]
        lines += [iptables_rule(*rule) for rule in wanted if rule[0] in chains]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def iptables_rule(chain: str, conditions: dict[str, object], verdict: str) -> str:
    words = [CONDITIONS[name][1].format(value) for name, value in conditions.items()]
    target = f"DNAT --to-destination {verdict[5:]}" if verdict.startswith("dnat ") else verdict.upper()
    return " ".join([f"-A KVMAPP-{chain.upper()}", *words, "-j", target])
