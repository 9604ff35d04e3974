"""What the doctor has found on all nodes: as data, as tables, and as lines that say what is wrong and how to fix it."""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from configs import within
from configs.storage import is_s3
from launch.node import GPUS, MISSING, Link, NodeReport
from launch.scheduler import Cluster

SHOWN = 10  # links, the worst
NETWORK = "look at the network, and at machine.env.GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO"
SPACE = {  # by the name of the fact and of its limit
    "memory_gib": "of memory available; end what else runs, or ask the scheduler for more",
    "disk_gib": "free where runs are written to; make room, or write elsewhere",
    "temp_gib": "free in the temporary folder; make room, or set machine.env.TMPDIR",
    "shm_gib": "free in /dev/shm; docker --shm-size, machine.kubernetes.shared_memory",
}
FIXES = {"worldloom": "check out the same commit", GPUS: "use one kind and driver"}  # of versions that differ
MOST = 1e9  # of a limit


@dataclass(frozen=True)
class LimitsConfig:
    """What a node must have, and how far the nodes may be apart."""

    disk_gib: float = within(0, MOST, 20.0)  # free where runs are written to
    temp_gib: float = within(0, MOST, 1.0)  # free in the temporary folder
    shm_gib: float = within(0, MOST, 1.0)  # free in /dev/shm; a container has 0.06 by default
    memory_gib: float = within(0, MOST, 2.0)  # available per process
    gpu_free: float = within(0, 1, 0.9)  # share of a GPU's memory that is free
    skew_s: float = within(0, MOST, 1.0)  # between clocks; the watchdog counts a rank as gone after 3 s of silence
    latency_ms: float = within(0, MOST, 5.0)  # one way
    mb_per_s: float = within(0, MOST, 100.0)  # 1e6 bytes, one way, between any two nodes
    slow_share: float = within(0, 1, 0.5)  # a link must have this share of the median


@dataclass(frozen=True)
class ClusterReport:
    """All that was found out."""

    nodes: tuple[NodeReport, ...]
    lost: dict[str, str]  # what is known of nodes without a report, by number
    links: tuple[Link, ...] = ()  # the slowest first
    unmeasured: str = ""  # why there are no links

    def name(self, node: int) -> str:
        return next((f"node {node} ({report.host})" for report in self.nodes if report.node == node), f"node {node}")

    def link_name(self, link: Link) -> str:
        return f"{self.name(link.source)} -> {self.name(link.target)}"


def find_issues(report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> list[str]:
    """One line each: where, what is wrong; what to do. The graver ones come first."""
    hint = f"see its own output; it must be started as that node and reach {cluster.host}:{cluster.port}"
    issues = [f"node {node}: {why}; {hint}" for node, why in report.lost.items()]
    for check in (_connections, _versions, _hardware, _paths):
        for node in report.nodes:
            issues += [f"{report.name(node.node)}: {issue}" for issue in check(node, report, cluster, limits)]
    return [*issues, *_links(report, limits)]


def _connections(node: NodeReport, report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    for peer in node.unreached:
        yield (
            f"no connection to {peer}; open all ports between the nodes (gloo and NCCL choose theirs freely); if the "
            "address is wrong, correct /etc/hosts or DNS there, or set machine.env.GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the interface that the nodes share"
        )


def _versions(node: NodeReport, report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    for name in dict.fromkeys(name for other in report.nodes for name in other.facts.versions):
        own, *others = (other.facts.versions.get(name, MISSING) for other in (node, *report.nodes))
        installed = Counter(version for version in others if version != MISSING).most_common(1)
        if own == MISSING:
            yield f"{name} is not installed; pip install -c constraints.txt -e ."
        elif own != installed[0][0] and (name != GPUS or cluster.device == "cuda"):
            usual, count = installed[0]
            fix = FIXES.get(name, "install the same version")
            yield f"{name} {own}, but {count} of {len(others)} nodes have {usual}; {fix} on all nodes"


def _hardware(node: NodeReport, report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    facts = node.facts
    if cluster.device == "cuda":
        if facts.visible_gpus != cluster.processes:
            yield (
                f"torch sees {facts.visible_gpus} GPUs, machine.processes is {cluster.processes}; set that to the "
                "number of GPUs, or look at the driver, CUDA_VISIBLE_DEVICES and whether torch is a CUDA build"
            )
        for i, free in enumerate(facts.gpu_free):
            if free < limits.gpu_free:
                yield f"{1 - free:.0%} of the memory of GPU {i} is in use; end what uses it (`nvidia-smi` shows it)"
    for name, what in SPACE.items():
        least = getattr(limits, name) * (cluster.processes if name == "memory_gib" else 1)
        if (there := getattr(facts, name)) < least:
            yield f"{there:.2f} of the needed {least:g} GiB {what}"


def _paths(node: NodeReport, report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    writers = {(other.node, path.url) for other in report.nodes for path in other.paths if not path.error}
    for path in node.paths:
        bucket = is_s3(path.url)
        if path.error:
            fix = "look at the credentials and the bucket's rules" if bucket else "mount it there, writable"
            yield f"cannot write to {path.url}: {path.error}; {fix}"
        if unread := [report.name(other) for other in path.unread if (other, path.url) in writers]:
            fix = "give all nodes the same endpoint" if bucket else "mount the same file system on all nodes"
            yield f"cannot read what {', '.join(unread)} wrote to {path.url}; {fix}"


def _links(report: ClusterReport, limits: LimitsConfig) -> Iterator[str]:
    """The worst are named, the others counted: one bad node makes all its links bad."""
    if report.unmeasured:
        yield f"links: were not measured: {report.unmeasured}; {NETWORK}"
    links = report.links
    usual = statistics.median([link.mb_per_s for link in links] or [0.0])
    least = max(limits.mb_per_s, limits.slow_share * usual)
    slow = [link for link in links if link.mb_per_s < least]
    late = sorted((link for link in links if link.latency_ms > limits.latency_ms), key=lambda link: -link.latency_ms)
    for link in slow[:SHOWN]:
        rates = f"{link.mb_per_s:.0f} MB/s, {least:.0f} are needed (the median is {usual:.0f})"
        yield f"{report.link_name(link)}: {rates}; {NETWORK}"
    for link in late[:SHOWN]:
        yield f"{report.link_name(link)}: {link.latency_ms:.2f} ms, {limits.latency_ms:g} are allowed; {NETWORK}"
    if more := len(slow[SHOWN:]) + len(late[SHOWN:]):
        yield f"links: {more} more are slow or late; report=FILE has all of them"
    for link in links:
        if link.source == 0 and abs(link.ahead_s) - link.latency_ms / 1e3 > limits.skew_s:
            clock = f"its clock is {abs(link.ahead_s):.2f} s {'ahead of' if link.ahead_s > 0 else 'behind'}"
            yield f"{report.name(link.target)}: {clock} that of {report.name(0)}; let chrony or ntpd set all clocks"


def report_text(report: ClusterReport) -> str:
    """A line for the first node's software (others that differ are issues), for every node, for the slowest links."""
    lines = []
    for node in report.nodes[:1]:
        versions = [f"{name} {version}" for name, version in node.facts.versions.items()]
        lines.append(f"software of {report.name(node.node)}: {', '.join(versions)}")
    for node in report.nodes:
        free = [f"{name.removesuffix('_gib')} {getattr(node.facts, name):.1f}" for name in SPACE]
        paths = [f"{path.url} {'no' if path.error or path.unread else 'yes'}" for path in node.paths]
        facts = f"GPUs {node.facts.versions.get(GPUS)}; GiB free: {', '.join(free)}; shared: {', '.join(paths) or '?'}"
        lines.append(f"{report.name(node.node)} at {node.address}: {facts}")
    for link in report.links[:SHOWN]:
        figures = f"{link.mb_per_s:.0f} MB/s, {link.latency_ms:.3f} ms, clock ahead {link.ahead_s:+.4f} s"
        lines.append(f"{report.link_name(link)}: {figures}")
    return "\n".join(lines)
