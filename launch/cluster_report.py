"""What the doctor has found on all nodes: as data, as tables, and as lines that say what is wrong and how to fix it."""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations

from configs import within
from configs.storage import is_s3
from launch.node import GPUS, Links, NodeReport
from launch.scheduler import Cluster

SHOWN = 10  # links, the slowest
MISSING = "missing"
NETWORK = "look at the network, and at machine.env.GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO"
FIXES = {"worldloom": "check out the same commit", GPUS: "use one kind and driver"}  # of versions that differ


@dataclass(frozen=True)
class LimitsConfig:
    """What a node must have, and how far the nodes may be apart."""

    disk_gib: float = 20.0  # free where runs are written to
    shm_gib: float = 1.0  # free in /dev/shm; a container has 0.06 by default
    gpu_free: float = within(0, 1, 0.9)  # share of a GPU's memory that is free
    skew_s: float = 1.0  # between clocks; the watchdog counts a rank as gone after 3 s of silence
    mb_per_s: float = 100.0  # 1e6 bytes, one way, between any two nodes
    slow_share: float = within(0, 1, 0.5)  # a link must have this share of the median


@dataclass(frozen=True)
class ClusterReport:
    """All that was found out."""

    nodes: tuple[NodeReport, ...]
    lost: dict[str, str]  # by number: what is known of nodes without a report
    links: Links = field(default_factory=Links)
    unmeasured: str = ""  # why there are no links

    def links_by_speed(self) -> list[tuple[float, str]]:
        """MB/s and between which nodes, the slowest first."""
        rates, nodes = self.links.mb_per_s, self.nodes
        return sorted((rates[i][j], f"{nodes[i]} -> {nodes[j]}") for i, j in permutations(range(len(rates)), 2))


def find_issues(report: ClusterReport, cluster: Cluster, limits: LimitsConfig) -> list[str]:
    """One line each: where, what is wrong; what to do. The graver ones come first."""
    hint = f"see its own output; it must be started as that node and reach {cluster.host}:{cluster.port}"
    issues = [f"node {node}: {why}; {hint}" for node, why in report.lost.items()]
    issues += _versions(report, cluster)
    issues += [f"{node}: {issue}" for node in report.nodes for issue in _hardware(node, cluster, limits)]
    issues += [f"{node}: {issue}" for node in report.nodes for issue in _sharing(node, report)]
    return [*issues, *_links(report, limits)]


def _versions(report: ClusterReport, cluster: Cluster) -> Iterator[str]:
    for name in dict.fromkeys(name for node in report.nodes for name in node.versions):
        versions = [node.versions.get(name, MISSING) for node in report.nodes]
        usual, count = max(Counter(versions).items(), key=lambda item: (item[0] != MISSING, item[1]))
        for node, version in zip(report.nodes, versions, strict=True):
            if version != usual and (name != GPUS or cluster.device == "cuda"):
                fix = FIXES.get(name, "install the same version")
                yield f"{node}: {name} {version}, but {count} of {len(versions)} nodes have {usual}; {fix} on all nodes"


def _hardware(node: NodeReport, cluster: Cluster, limits: LimitsConfig) -> Iterator[str]:
    if cluster.device == "cuda" and len(node.gpu_free) != cluster.processes:
        yield (
            f"torch sees {len(node.gpu_free)} GPUs, machine.processes is {cluster.processes}; set that to the number "
            "of GPUs, or look at the driver, CUDA_VISIBLE_DEVICES and whether torch is a CUDA build"
        )
    for i, free in enumerate(node.gpu_free):
        if free < limits.gpu_free:
            yield f"{1 - free:.0%} of the memory of GPU {i} is in use; end what uses it (`nvidia-smi` shows it)"
    if node.disk_gib < limits.disk_gib:
        what = "free where runs are written to; make room, or write elsewhere"
        yield f"{node.disk_gib:.2f} of the needed {limits.disk_gib:g} GiB {what}"
    if node.shm_gib < limits.shm_gib:
        what = "free in /dev/shm; docker --shm-size, machine.kubernetes.shared_memory"
        yield f"{node.shm_gib:.2f} of the needed {limits.shm_gib:g} GiB {what}"


def _sharing(node: NodeReport, report: ClusterReport) -> Iterator[str]:
    """Ports, folders and buckets."""
    for peer in node.unreached:
        yield (
            f"no connection to {peer}; open all ports between the nodes (gloo and NCCL choose theirs freely); if the "
            "address is wrong, correct /etc/hosts or DNS there, or set machine.env.GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME to the interface that the nodes share"
        )
    for path in node.paths:
        if path.error:
            fix = "look at the credentials and the bucket's rules" if is_s3(path.url) else "mount it there, writable"
            yield f"cannot write to {path.url}: {path.error}; {fix}"
        unread = [other for other in report.nodes if other.node in path.unread]
        if names := [str(other) for other in unread if path.url in [p.url for p in other.paths if not p.error]]:
            fix = "give all nodes the same endpoint" if is_s3(path.url) else "mount the same file system on all nodes"
            yield f"cannot read what {', '.join(names)} wrote to {path.url}; {fix}"


def _links(report: ClusterReport, limits: LimitsConfig) -> Iterator[str]:
    """The worst are named, the others counted: one bad node makes all its links bad."""
    if report.unmeasured:
        yield f"links: were not measured: {report.unmeasured}; {NETWORK}"
    if links := report.links_by_speed():
        median = statistics.median(rate for rate, _ in links)
        least = max(limits.mb_per_s, limits.slow_share * median)
        slow = [(rate, between) for rate, between in links if rate < least]
        for rate, between in slow[:SHOWN]:
            yield f"{between}: {rate:.0f} MB/s, {least:.0f} are needed (the median is {median:.0f}); {NETWORK}"
        if slow[SHOWN:]:
            yield f"links: {len(slow[SHOWN:])} more are slow; report=FILE has all of them"
    for node, ahead_s in zip(report.nodes, report.links.ahead_s, strict=False):
        if abs(ahead_s) > limits.skew_s:
            clock = f"its clock is {abs(ahead_s):.2f} s {'ahead of' if ahead_s > 0 else 'behind'}"
            yield f"{node}: {clock} that of {report.nodes[0]}; let chrony or ntpd set all clocks"


def report_text(report: ClusterReport) -> str:
    """A line for the first node's software (others that differ are issues), for every node, for the slowest links."""
    first = report.nodes[0]
    lines = [f"software of {first}: {', '.join(f'{name} {version}' for name, version in first.versions.items())}"]
    for node in report.nodes:
        paths = ", ".join(f"{path.url} {'no' if path.error or path.unread else 'yes'}" for path in node.paths)
        free = f"GiB free: disk {node.disk_gib:.1f}, shm {node.shm_gib:.1f}"
        lines.append(f"{node} at {node.address}: GPUs {node.versions.get(GPUS)}; {free}; shared: {paths or '?'}")
    lines += [f"{between}: {rate:.0f} MB/s" for rate, between in report.links_by_speed()[:SHOWN]]
    return "\n".join(lines)
