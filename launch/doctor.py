"""Examines the machines of a run, every node at once, before anything is queued."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from configs import build, build_from, merge_args, storage, to_dict, within
from configs.errors import UserError, one_line
from configs.storage import is_s3
from configs.untrusted import parse_object, reading
from launch.cluster_report import ClusterReport, LimitsConfig, find_issues, report_text
from launch.machine import MachineConfig
from launch.node import NodeReport, address, inspect_node, measure, probe_connectivity, probe_file, probe_path
from launch.rendezvous import LOOPBACK, listen, own_address, serve_store
from launch.scheduler import Cluster, Job, Shell, quoted, require_own
from train.config import TrainConfig
from train.watchdog import call

T = TypeVar("T")
ENDING_S = 10.0  # by which nodes may be later than the first
REPORT_MARK = '  "nodes": ['  # a line of a report begins so


@dataclass(frozen=True)
class DoctorConfig:
    """`python -m launch doctor`."""

    machine: MachineConfig
    shared: str | None = None  # folder that all nodes share
    bucket: str | None = None  # s3://bucket or s3://bucket/folder
    timeout_s: float = within(5, 86_400, 60.0)  # for a node to come, for its report, and for the transfers of a pair
    megabytes: float = within(1e-6, 100_000, 32.0)  # 1e6 bytes, sent between two nodes at most
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    report: str | None = None  # file for all findings, as JSON
    dry_run: bool = False  # only print what would be started
    script: str | None = None  # file for the Slurm script or the Kubernetes manifests; none: they are printed

    def __post_init__(self) -> None:
        if self.bucket and not is_s3(self.bucket):
            raise UserError(f"bucket={self.bucket} must begin with s3://; a folder is given as shared=")

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.shared, self.bucket) if path]


@dataclass(frozen=True)
class NodeAddress:
    """How a node introduces itself."""

    host: str
    address: str  # where its processes let others find them
    port: int  # where it listens to be probed


def read_doctor(args: Sequence[str]) -> DoctorConfig:
    """The doctor's settings; those that only a run has are skipped, since a machine's file may hold them."""
    merged = merge_args(args)
    if "machine" not in merged:
        raise UserError("no machine: begin with a file of configs/machines")
    of_runs = {setting.name for setting in fields(TrainConfig)} - {setting.name for setting in fields(DoctorConfig)}
    return build(DoctorConfig, {name: value for name, value in merged.items() if name not in of_runs})


def doctor(args: list[str]) -> int:
    """Examine every node before a run: configs/machines/X.yaml shared=FOLDER bucket=s3://... timeout_s= megabytes="""
    config = read_doctor(args)
    status = config.machine.start(doctor_job(config, args), config.script, config.dry_run)
    if dist.is_initialized():  # after a failure: NCCL would wait for a lost peer
        os._exit(status)
    return status


def doctor_job(config: DoctorConfig, args: Sequence[str]) -> Job:
    """For a scheduler: every node runs the doctor of a local machine, told which of them it is."""
    passed_on = [arg for arg in args if arg.partition("=")[0] not in ("script", "dry_run")]

    def line(rank: str | None, host: str | None) -> list[str]:
        own = {"node_rank": rank, "host": host}
        where = [Shell(f"machine.{name}={quoted(value)}") for name, value in own.items() if value is not None]
        return ["python", "-m", "launch", "doctor", *passed_on, "machine.kind=local", *where]

    return Job(f"{config.machine.name}-doctor", line, limit_s=5 * config.timeout_s + 60, here=partial(_here, config))


def _here(config: DoctorConfig) -> int:
    node = config.machine.node_rank
    if config.report and node == 0:
        require_own(config.report, REPORT_MARK)
    os.environ.update(config.machine.environment)  # interfaces, credentials: what the run's processes would have
    try:
        report = examine(config)
    except (ConnectionError, RuntimeError) as error:  # the first node is not there, or no longer
        print(printable(f"problem: node {node}: {one_line(error)}"), flush=True)
        return 1
    if node != 0:
        print(f"node {node}: examined; the findings are node 0's", flush=True)
        return 0
    if config.report:
        storage.write_text(config.report, json.dumps(to_dict(report), indent=2))
    issues = find_issues(report, config.machine, config.limits)
    lines = [report_text(report), "", *(f"problem: {issue}" for issue in issues)]
    lines += [f"problems found: {len(issues)}" if issues else "no problem found"]
    print(printable("\n".join(lines)), flush=True)
    return 1 if issues else 0


def printable(text: str) -> str:
    """`text` without what would steer a terminal: other nodes have said parts of it."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def examine(config: DoctorConfig) -> ClusterReport:
    """What all nodes find out about themselves and each other; links on node 0 alone."""
    cluster, limit_s, where = config.machine, config.timeout_s, address(os.environ)
    store = join_nodes(cluster, limit_s)
    with listen((cluster.nodes > 1 and own_address(where)) or LOOPBACK, 0) as listener:  # to be probed
        own = NodeAddress(socket.gethostname(), where, listener.getsockname()[1])
        addresses = all_gather(store, cluster, "address", own, limit_s)
        # It names files: the ports make it new, and no node can choose it.
        token = hashlib.sha256(repr(sorted(addresses.items())).encode()).hexdigest()[:12]
        reports = all_gather(store, cluster, "report", look_around(config, addresses, token), limit_s + ENDING_S)
    for path in config.paths:
        with suppress(OSError):  # it could not be written
            storage.remove(probe_file(path, token, cluster.node_rank))
    if any(report.node != node or len(report.paths) != len(config.paths) for node, report in reports.items()):
        raise ConnectionError("a node reports what it was not asked; start the same doctor on all nodes")
    lost = {
        str(node): f"{'came, but was not heard of again' if node in addresses else 'did not come'} within {limit_s:g} s"
        for node in set(range(cluster.nodes)) - reports.keys()
    }
    report = ClusterReport(tuple(reports.values()), lost)
    if lost:
        report = replace(report, unmeasured="not all nodes have reported")
    elif any(node.unreached for node in report.nodes):
        report = replace(report, unmeasured="not all nodes reach each other")
    elif cluster.nodes > 1:
        report = measure_links(config, store, report)
    store.set(f"done/{cluster.node_rank}", "")
    if cluster.node_rank == 0:
        wait_for(store, [f"done/{node}" for node in reports], ENDING_S)  # the store ends with this process
    return report


def look_around(config: DoctorConfig, addresses: Mapping[int, NodeAddress], token: str) -> NodeReport:
    """This node, and what it sees of the others."""
    node, limit_s = config.machine.node_rank, config.timeout_s
    own, others = addresses[node], {peer: there for peer, there in addresses.items() if peer != node}
    facts = call("looking at GPUs, memory and disks", limit_s, inspect_node, config.shared)
    listeners = {f"node {i} ({peer.host}) at {peer.address}": (peer.address, peer.port) for i, peer in others.items()}
    unreached = probe_connectivity(listeners)
    paths = [
        call(f"writing to {path} and reading it", limit_s, probe_path, path, token, node, addresses)
        for path in config.paths
    ]
    return NodeReport(node, own.host, own.address, facts, tuple(paths), unreached)


def measure_links(config: DoctorConfig, store: Store, report: ClusterReport) -> ClusterReport:
    """The report with the links of all nodes, or on node 0 with why it could not measure its own."""
    cluster, limit_s = config.machine, config.timeout_s
    print(f"measuring links between {cluster.nodes} nodes", flush=True)
    try:
        own = measure(PrefixStore("links", store), cluster.node_rank, cluster.nodes, config.megabytes, limit_s)
    except (ConnectionError, RuntimeError) as error:
        if cluster.node_rank != 0:
            raise
        return replace(report, unmeasured=one_line(error))
    measured = all_gather(store, cluster, "links", own, limit_s)
    links = sorted((link for part in measured.values() for link in part.links), key=lambda link: link.mb_per_s)
    missing = "" if len(measured) == cluster.nodes else "not all nodes have sent what they measured"
    return replace(report, links=tuple(links), unmeasured=missing)


def join_nodes(cluster: Cluster, limit_s: float) -> TCPStore:
    """The store through which the nodes talk, at the run's own port. Raises ConnectionError with one line."""
    deadline, timeout, where = time.monotonic() + limit_s, timedelta(seconds=limit_s), f"{cluster.host}:{cluster.port}"
    if cluster.node_rank == 0:
        try:
            return serve_store(cluster.host, cluster.port, cluster.nodes, timeout)
        except OSError as error:
            fix = "end what holds it (`ss -ltnp`), or give machine.port another number on all nodes"
            raise ConnectionError(f"port {cluster.port} cannot be listened on ({error}); {fix}") from error
    while True:
        try:
            socket.create_connection((cluster.host, cluster.port), timeout=limit_s).close()  # torch's waiting is loud
            return TCPStore(cluster.host, cluster.port, is_master=False, wait_for_workers=False, timeout=timeout)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline - 1:
                fix = "start the doctor there too, open the port, or give machine.host a name that all nodes know"
                raise ConnectionError(f"{where} of node 0 not reached within {limit_s:g} s ({error}); {fix}") from error
            time.sleep(1)


def all_gather(store: Store, cluster: Cluster, name: str, value: T, limit_s: float) -> dict[int, T]:
    """The value of every node, on every node, without those that gave none within `limit_s`."""
    node, keys, absent = cluster.node_rank, [f"{name}/{peer}" for peer in range(cluster.nodes)], f"{name}/absent"
    put(store, keys[node], value)
    if node == 0:
        wait_for(store, keys, limit_s)
        store.set(absent, " ".join(key for key in keys if not store.check([key])))
    elif not wait_for(store, [absent], 2 * limit_s):
        raise ConnectionError(f"node 0 has not answered within {2 * limit_s:g} s")
    late = store.get(absent).split()
    if keys[node].encode() in late:
        raise ConnectionError(f"came {limit_s:g} s or more after node 0; start all at once, or raise timeout_s")
    return {peer: take(store, key, type(value)) for peer, key in enumerate(keys) if key.encode() not in late}


def put(store: Store, key: str, value: object) -> None:
    store.set(key, json.dumps(to_dict(value)))


def take(store: Store, key: str, cls: type[T]) -> T:
    """What a node has put into the store; ConnectionError with one line for what is no `cls`."""
    where = f"what another node says as {key!r}"
    try:
        with reading(where, "start the same doctor on all nodes"):
            return build_from(cls, parse_object(store.get(key), where), where)
    except ValueError as error:
        raise ConnectionError(one_line(error)) from error


def wait_for(store: Store, keys: Sequence[str], limit_s: float) -> bool:
    """Whether all of `keys` are in the store within `limit_s`; polled, since torch's own waiting warns."""
    deadline = time.monotonic() + limit_s
    while not store.check([*keys]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
