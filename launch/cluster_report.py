"""What the doctor has found on all nodes: as data, as tables, and as lines that say what is wrong and how to fix it."""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from configs.cli import table
from configs.errors import UserError
from configs.storage import is_s3
from launch.links import Link, Measurement
from launch.node import MISSING, NodeFacts, SharedPath
from launch.scheduler import Cluster

SHOWN = 10  # links in the table, and slow or late ones among the issues: the worst
NETWORK = "look at the network, and at machine.env.GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO"


@dataclass(frozen=True)
class LimitsConfig:
    """What a node must have, and how far the nodes may be apart."""

    disk_gib: float = 20.0  # free where runs are written to
    temp_gib: float = 1.0  # free in the temporary folder
    shm_gib: float = 1.0  # free in /dev/shm; a container has 0.06 unless it is told otherwise
    memory_gib: float = 2.0  # available per process
    gpu_free: float = 0.9  # share of a GPU's memory that is free
    skew_s: float = 1.0  # between clocks; the watchdog counts a rank as gone after 3 s of silence
    latency_ms: float = 5.0  # one way
    mb_per_s: float = 100.0  # 1e6 bytes, one way, between any two nodes
    slow_share: float = 0.5  # a link must have this share of the median

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
    paths: tuple[SharedPath, ...]
    unreached: dict[str, str]  # why, by the number of a node that cannot be connected to

    def __post_init__(self) -> None:
        if self.address:
            ip_address(self.address)
        if not all(node.isdecimal() for node in self.unreached):
            raise UserError("unreached must be by the number of a node")

    @property
    def findable(self) -> bool:
        """Whether other nodes can find it."""
        return bool(self.address) and not ip_address(self.address).is_loopback


@dataclass(frozen=True)
class ClusterReport:
    """All that was found out."""

    nodes: tuple[NodeReport, ...]
    lost: dict[str, str]  # what is known of nodes without a report, by number
    measured: dict[str, Measurement]  # by number of the node
    unmeasured: str = ""  # why links were not measured

    @property
    def links(self) -> list[Link]:
        """The slowest first."""
        links = [link for measurement in self.measured.values() for link in measurement.links]
        return sorted(links, key=lambda link: link.mb_per_s)

    def name(self, node: int) -> str:
        hosts = {report.node: report.host for report in self.nodes}
        return f"node {node} ({hosts[node]})" if node in hosts else f"node {node}"

    def link_name(self, link: Link) -> str:
        return f"{self.name(link.source)} -> {self.name(link.target)}"


def obstacle(reports: Sequence[NodeReport], cluster: Cluster) -> str:
    """Why the nodes cannot form a process group; empty if they can try."""
    if len(reports) < cluster.nodes:
        return "not all nodes have reported"
    if cluster.nodes > 1 and any(report.unreached or not report.findable for report in reports):
        return "not all nodes reach each other"
    return ""


def find_issues(report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> list[str]:
    """One line each: where, what is wrong; what to do. The graver ones come first."""
    issues = [
        f"node {node}: {why}; see its own output; it must be started as node {node} and reach "
        f"{cluster.host}:{cluster.port}"
        for node, why in report.lost.items()
    ]
    for node in report.nodes:
        issues += [f"{report.name(node.node)}: {issue}" for issue in _network(node, report, cluster)]
    issues += _software(report)
    for node in report.nodes:
        issues += [f"{report.name(node.node)}: {issue}" for issue in _hardware(node, report, cluster, limits)]
    for node in report.nodes:
        issues += [f"{report.name(node.node)}: {issue}" for issue in _paths(node, report)]
    return [*issues, *_links(report, cluster, limits)]


def _network(node: NodeReport, report: ClusterReport, cluster: Cluster) -> Iterator[str]:
    if cluster.nodes > 1 and not node.findable:
        yield (
            f"its own name {node.host} means {node.address or 'no address'}, at which no other node finds it; give the "
            "name its address in /etc/hosts or DNS, or set machine.env.GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to "
            "the interface that the nodes share"
        )
        return
    for peer, why in node.unreached.items():
        fix = "open all ports between the nodes: gloo and NCCL choose theirs freely"
        yield f"no connection to {report.name(int(peer))}: {why}; {fix}"


def _software(report: ClusterReport) -> Iterator[str]:
    for name in dict.fromkeys(name for node in report.nodes for name in node.facts.versions):
        versions = {node.node: node.facts.versions.get(name, MISSING) for node in report.nodes}
        counts = Counter(version for version in versions.values() if version != MISSING)
        usual, count = counts.most_common(1)[0] if counts else (MISSING, 0)
        fix = "check out the same commit" if name == "worldloom" else "install the same version"
        for node, version in versions.items():
            if version == MISSING:
                yield f"{report.name(node)}: {name} is not installed; pip install -c constraints.txt -e ."
            elif version != usual:
                others = f"{count} of {len(versions)} nodes have {usual}"
                yield f"{report.name(node)}: {name} {version}, but {others}; {fix} on all nodes"


def gpu_kinds(facts: NodeFacts) -> str:
    """As `8 x NVIDIA H100 (550.54.15)`."""
    kinds = Counter(f"{gpu.name} ({gpu.driver})" for gpu in facts.gpus)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"


def _hardware(node: NodeReport, report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    facts = node.facts
    if cluster.device == "cuda":
        usual = Counter(gpu_kinds(other.facts) for other in report.nodes).most_common(1)[0][0]
        if facts.visible_gpus != cluster.processes:
            yield (
                f"torch sees {facts.visible_gpus} GPUs, machine.processes is {cluster.processes}; set that to the "
                "number of GPUs, or look at the driver, CUDA_VISIBLE_DEVICES and whether torch is a CUDA build"
            )
        for i, gpu in enumerate(facts.gpus):
            if gpu.free_gib < limits.gpu_free * gpu.memory_gib:
                used = f"{gpu.memory_gib - gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB of GPU {i} are in use"
                yield f"{used}; end what uses them (`nvidia-smi` shows it)"
        if (kind := gpu_kinds(facts)) != usual:
            yield f"its GPUs are {kind}, those of most nodes {usual}; use nodes of one kind and one driver"
    memory = limits.memory_gib * cluster.processes
    for there, least, what in (
        (facts.disk_gib, limits.disk_gib, "free where runs are written to; make room, or write elsewhere"),
        (facts.temp_gib, limits.temp_gib, "free in the temporary folder; make room, or set machine.env.TMPDIR"),
        (facts.shm_gib, limits.shm_gib, "free in /dev/shm; docker --shm-size, machine.kubernetes.shared_memory"),
        (facts.available_gib, memory, "of memory available; end what else runs, or ask the scheduler for more"),
    ):
        if there < least:
            yield f"{there:.2f} of the needed {least:g} GiB {what}"


def _paths(node: NodeReport, report: ClusterReport) -> Iterator[str]:
    writers = {(other.node, path.url) for other in report.nodes for path in other.paths if not path.error}
    for path in node.paths:
        bucket = is_s3(path.url)
        if path.error:
            fix = "look at the credentials and the bucket's rules" if bucket else "mount it there, writable"
            yield f"cannot write to {path.url}: {path.error}; {fix}"
        if unread := [report.name(other) for other in path.unread if (other, path.url) in writers]:
            fix = "give all nodes the same endpoint" if bucket else "mount the same file system on all nodes"
            yield f"cannot read what {', '.join(unread)} wrote to {path.url}; {fix}"


def _links(report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    """The worst are named, the others counted: one bad node makes all its links bad."""
    if report.unmeasured:
        yield f"links: were not measured: {report.unmeasured}; fix that and run the doctor again"
        return
    for node in range(cluster.nodes if cluster.nodes > 1 else 0):
        if error := report.measured.get(str(node), Measurement(error="has said nothing more")).error:
            yield f"{report.name(node)}: {error}; {NETWORK}"
    links = report.links
    usual = statistics.median([link.mb_per_s for link in links]) if links else 0.0
    least = max(limits.mb_per_s, limits.slow_share * usual)
    slow = [link for link in links if link.mb_per_s < least]
    late = sorted((link for link in links if link.latency_ms > limits.latency_ms), key=lambda link: -link.latency_ms)
    for link in slow[:SHOWN]:
        what = f"{link.mb_per_s:.0f} MB/s, {least:.0f} are needed (the median is {usual:.0f})"
        yield f"{report.link_name(link)}: {what}; {NETWORK}"
    for link in late[:SHOWN]:
        yield f"{report.link_name(link)}: {link.latency_ms:.2f} ms, {limits.latency_ms:g} are allowed; {NETWORK}"
    if more := len(slow[SHOWN:]) + len(late[SHOWN:]):
        yield f"links: {more} more are slow or late; report=FILE has all of them"
    for link in links:
        if link.source == 0 and abs(link.ahead_s) - link.latency_ms / 1e3 > limits.skew_s:
            clock = f"its clock is {abs(link.ahead_s):.2f} s {'ahead of' if link.ahead_s > 0 else 'behind'}"
            yield f"{report.name(link.target)}: {clock} that of {report.name(0)}; let chrony or ntpd set all clocks"


def report_text(report: ClusterReport) -> str:
    """A table of the nodes, their software, a table of the links."""
    titles = ["node", "host", "address", "GPUs", "cores", "memory", "disk", "temp", "/dev/shm"]
    rows = [[*titles, *(path.url for path in report.nodes[0].paths)]] if report.nodes else [titles]
    software: dict[str, list[str]] = {}
    for node in report.nodes:
        facts = node.facts
        space = [f"{gib:.1f}" for gib in (facts.available_gib, facts.disk_gib, facts.temp_gib, facts.shm_gib)]
        paths = ["no" if path.error else "not shared" if path.unread else "shared" for path in node.paths]
        rows.append([str(node.node), node.host, node.address, gpu_kinds(facts), str(facts.cores), *space, *paths])
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        software.setdefault(versions, []).append(str(node.node))
    parts = ["free GiB\n" + table(rows)]
    parts += [f"software of node {', '.join(nodes)}: {versions}" for versions, nodes in software.items()]
    links = [["link", "MB/s", "latency ms", "clock ahead s"]]
    for link in report.links[:SHOWN]:
        figures = [f"{link.mb_per_s:.0f}", f"{link.latency_ms:.3f}", f"{link.ahead_s:+.4f}"]
        links.append([report.link_name(link), *figures])
    if report.links:
        parts.append(f"{len(report.links)} links between nodes; the slowest:\n{table(links)}")
        rate = report.measured["0"].all_reduce_mb_per_s if "0" in report.measured else None
        parts.append(f"all nodes together (all-reduce, bus): {rate or 0:.0f} MB/s")
    return "\n\n".join(parts)
