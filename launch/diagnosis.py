"""What the doctor has found, as plain data, and what is wrong with it: pure functions."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from configs.errors import UserError
from configs.storage import is_s3
from launch.links import Link, RankReport
from launch.machine import MachineConfig
from launch.node import MISSING, NodeFacts
from launch.places import Place

NAMED = 10  # links that are slow, and that are late


@dataclass(frozen=True)
class LimitsConfig:
    """What a node must have, and how far the nodes may be apart."""

    disk_gib: float = 20.0  # free where runs are written to
    temp_gib: float = 1.0  # free in the temporary folder
    shm_gib: float = 1.0  # free in /dev/shm; a container has 0.06 unless it is told otherwise
    memory_gib: float = 2.0  # available per process
    gpu_free: float = 0.9  # share of a GPU's memory that nobody holds
    skew_s: float = 1.0  # between clocks; the watchdog counts a rank as gone after 3 s of silence
    latency_ms: float = 5.0  # one way
    mb_per_s: float = 100.0  # 1e6 bytes, one way, between any two ranks
    slow_share: float = 0.5  # a link must have this share of the median of its kind

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or max(self.gpu_free, self.slow_share) > 1:
            raise UserError("limits.* must be 0 or more, limits.gpu_free and limits.slow_share at most 1")


@dataclass(frozen=True)
class NodeReport:
    """A node, and what it sees of the others."""

    node: int
    host: str
    address: str  # where its processes let others find them
    facts: NodeFacts
    places: tuple[Place, ...]
    unreached: dict[str, str]  # why, by the number of a node to which no connection could be opened

    def __post_init__(self) -> None:
        if self.address:
            ip_address(self.address)
        if not all(node.isdecimal() for node in self.unreached):
            raise UserError("unreached must be by the number of a node")


@dataclass(frozen=True)
class Examination:
    """All that was found out."""

    nodes: tuple[NodeReport, ...]
    lost: dict[str, str]  # what is known of nodes without a report, by number
    ranks: tuple[RankReport, ...]  # empty if links were not measured
    unmeasured: str  # why they were not; empty if they were, or were to be

    def name(self, node: int) -> str:
        hosts = {report.node: report.host for report in self.nodes}
        return f"node {node} ({hosts[node]})" if node in hosts else f"node {node}"


@dataclass(frozen=True)
class Problem:
    """What is wrong where, and what to do."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


def obstacle(nodes: Sequence[NodeReport], lost: Mapping[str, str], machine: MachineConfig) -> str:
    """Why no process group of all ranks can be made; empty if one can be tried."""
    if lost:
        return f"node {', '.join(lost)} is not there"
    if machine.nodes > 1 and any(one.unreached or not _findable(one.address) for one in nodes):
        return "not all nodes reach each other"
    return ""


def _findable(address: str) -> bool:
    return bool(address) and not ip_address(address).is_loopback


def find_problems(found: Examination, machine: MachineConfig, limits: LimitsConfig) -> list[Problem]:
    """All of them, the graver ones first."""
    return [
        *_lost(found, machine),
        *_unreached(found, machine),
        *_software(found),
        *_hardware(found, machine, limits),
        *_space(found, machine, limits),
        *_places(found),
        *_ranks(found, machine, limits),
    ]


def _lost(found: Examination, machine: MachineConfig) -> Iterator[Problem]:
    for node, why in found.lost.items():
        yield Problem(
            f"node {node}",
            why,
            f"see its own output; it must be started as node {node} and reach {machine.host}:{machine.port}",
        )


def _unreached(found: Examination, machine: MachineConfig) -> Iterator[Problem]:
    for one in found.nodes:
        own = found.name(one.node)
        if machine.nodes > 1 and not _findable(one.address):
            yield Problem(
                own,
                f"its own name {one.host} means {one.address or 'no address'}, at which no other node finds it",
                "give the name its address in /etc/hosts or DNS, or set machine.env.GLOO_SOCKET_IFNAME (and "
                "NCCL_SOCKET_IFNAME) to the interface that the nodes share",
            )
            continue
        for node, why in one.unreached.items():
            yield Problem(
                own,
                f"no connection to {found.name(int(node))}: {why}",
                "open all ports between the nodes: gloo and NCCL choose theirs freely",
            )


def _software(found: Examination) -> Iterator[Problem]:
    for name in dict.fromkeys(name for one in found.nodes for name in one.facts.versions):
        by_node = {one.node: one.facts.versions.get(name, MISSING) for one in found.nodes}
        for node in (node for node, version in by_node.items() if version == MISSING):
            yield Problem(found.name(node), f"{name} is not installed", "pip install -c constraints.txt -e .")
        there = {node: version for node, version in by_node.items() if version != MISSING}
        usual, count = Counter(there.values()).most_common(1)[0] if there else (MISSING, 0)
        others = {node: version for node, version in there.items() if version != usual}
        remedy = "check out the same commit" if name == "worldloom" else "install the same version"
        for node, version in others.items():
            rest = f"{count} of {len(by_node)} nodes have {usual}"
            yield Problem(found.name(node), f"{name} {version}, but {rest}", f"{remedy} on all nodes")


def _hardware(found: Examination, machine: MachineConfig, limits: LimitsConfig) -> Iterator[Problem]:
    if machine.device != "cuda":
        return
    for one in found.nodes:
        own, facts = found.name(one.node), one.facts
        if facts.seen_gpus != machine.processes:
            yield Problem(
                own,
                f"torch sees {facts.seen_gpus} GPUs, machine.processes is {machine.processes}",
                "set machine.processes to the number of GPUs, or look at the driver, CUDA_VISIBLE_DEVICES and whether "
                "torch is a CUDA build",
            )
        for i, gpu in enumerate(facts.gpus):
            if gpu.free_gib < limits.gpu_free * gpu.memory_gib:
                held = f"{gpu.memory_gib - gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB of GPU {i} are held"
                yield Problem(own, held, "end what holds them (`nvidia-smi` shows it)")
    kinds = Counter(_kind(one.facts) for one in found.nodes)
    for one in found.nodes:
        if (kind := _kind(one.facts)) != (usual := kinds.most_common(1)[0][0]):
            what = f"its GPUs are {kind}, those of most nodes {usual}"
            yield Problem(found.name(one.node), what, "use nodes of one kind and one driver: the slowest sets the pace")


def _kind(facts: NodeFacts) -> str:
    return ", ".join(f"{n} x {name}, driver {driver}" for (name, driver), n in gpu_kinds(facts).items()) or "none"


def gpu_kinds(facts: NodeFacts) -> Mapping[tuple[str, str], int]:
    """How many GPUs of which name and driver."""
    return Counter((gpu.name, gpu.driver) for gpu in facts.gpus)


def _space(found: Examination, machine: MachineConfig, limits: LimitsConfig) -> Iterator[Problem]:
    wants = (
        ("disk_gib", limits.disk_gib, "free where runs are written to", "make room there, or write elsewhere"),
        ("temp_gib", limits.temp_gib, "free in the temporary folder", "make room there, or set machine.env.TMPDIR"),
        ("shm_gib", limits.shm_gib, "free in /dev/shm", "give the container more (docker --shm-size, an emptyDir)"),
        (
            "available_gib",
            limits.memory_gib * machine.processes,
            f"of memory available for {machine.processes} processes",
            "end what else runs there, or ask the scheduler for more (machine.slurm.memory, machine.kubernetes.memory)",
        ),
    )
    for one in found.nodes:
        for field, least, what, remedy in wants:
            if (there := getattr(one.facts, field)) < least:
                yield Problem(found.name(one.node), f"{there:.2f} GiB {what}, {least:g} are wanted", remedy)


def _places(found: Examination) -> Iterator[Problem]:
    for one in found.nodes:
        own = found.name(one.node)
        for place in one.places:
            bucket = is_s3(place.url)
            if place.error:
                remedy = "look at the credentials and the bucket's rules" if bucket else "mount it there, writable"
                yield Problem(own, f"cannot write to {place.url}: {place.error}", remedy)
            if place.unread:
                what = f"cannot read what {', '.join(map(found.name, place.unread))} wrote to {place.url}"
                remedy = "give all nodes the same endpoint" if bucket else "mount the same file system on all nodes"
                yield Problem(own, what, remedy)


def _ranks(found: Examination, machine: MachineConfig, limits: LimitsConfig) -> Iterator[Problem]:
    if not found.ranks:
        if found.unmeasured:
            yield Problem("links", f"were not measured: {found.unmeasured}", "mend that and run the doctor again")
        return
    look = "look at the network and, with GPUs, at machine.env.NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME"
    missing = set(range(machine.ranks)) - {one.rank for one in found.ranks}
    for rank in sorted(missing):
        yield Problem(found.name(rank // machine.processes), f"rank {rank} has said nothing more", look)
    for one in found.ranks:
        if one.error:
            yield Problem(found.name(one.node), f"rank {one.rank}: {one.error}", look)
        for clock in one.clocks:
            if abs(clock.ahead_s) - clock.round_trip_s / 2 > limits.skew_s:
                way = "ahead of" if clock.ahead_s > 0 else "behind"
                what = f"its clock is {abs(clock.ahead_s):.2f} s {way} that of {found.name(0)}"
                yield Problem(found.name(clock.node), what, "let chrony or ntpd set the clocks of all nodes")
    yield from _links(found, machine, limits)


def all_links(found: Examination, machine: MachineConfig) -> dict[bool, list[Link]]:
    """Links between nodes (True) and within them (False)."""
    links = [link for one in found.ranks for link in one.links]
    kinds: dict[bool, list[Link]] = {True: [], False: []}
    for link in links:
        kinds[link.ranks[0] // machine.processes != link.ranks[1] // machine.processes].append(link)
    return kinds


def _links(found: Examination, machine: MachineConfig, limits: LimitsConfig) -> Iterator[Problem]:
    """The worst of each kind are named, the others counted: one bad node makes all its links bad."""
    for links in all_links(found, machine).values():
        usual = statistics.median([link.mb_per_s for link in links]) if links else 0.0
        least = max(limits.mb_per_s, limits.slow_share * usual)
        slow = sorted((link for link in links if link.mb_per_s < least), key=lambda link: link.mb_per_s)
        late = sorted(
            (link for link in links if link.latency_ms > limits.latency_ms), key=lambda link: -link.latency_ms
        )
        interface = "which interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        for link in slow[:NAMED]:
            way = "there" if link.there_mb_per_s < link.back_mb_per_s else "back"
            what = f"{link.mb_per_s:.0f} MB/s on the way {way}, {least:.0f} are wanted (the median is {usual:.0f})"
            yield Problem(link_name(found, machine, link), what, f"look at cables, switches and {interface}")
        for link in late[:NAMED]:
            what = f"{link.latency_ms:.2f} ms one way, {limits.latency_ms:g} are wanted"
            yield Problem(link_name(found, machine, link), what, f"look at how far apart the nodes are and {interface}")
        if (more := len(slow[NAMED:]) + len(late[NAMED:])) > 0:
            yield Problem("links", f"{more} more are slow or late", "report=FILE has all of them")


def link_name(found: Examination, machine: MachineConfig, link: Link) -> str:
    """As `node 0 (a) rank 1 - node 1 (b) rank 9`; without ranks where a node has one."""
    ends = [found.name(rank // machine.processes) for rank in link.ranks]
    if machine.processes > 1:
        ends = [f"{end} rank {rank}" for end, rank in zip(ends, link.ranks, strict=True)]
    return " - ".join(ends)
