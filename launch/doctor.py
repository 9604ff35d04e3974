"""Examines the machines of a run, every node at once, before anything is queued."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import DistStoreError, Store, TCPStore

from configs import build, build_from, merge_args, storage, to_dict, within
from configs.errors import UserError, one_line
from configs.storage import write_text
from configs.untrusted import parse_object
from launch.cluster_report import ClusterReport, LimitsConfig, find_issues, report_text
from launch.node import GPUS, Links, NodeReport, address, free_gib, gpus, measure, probe_file, probe_path, software
from launch.rendezvous import LOOPBACK, listen, serve_store
from launch.run import LaunchConfig
from launch.scheduler import Cluster, Job, Shell, quoted, require_own
from train.config import TrainConfig
from train.watchdog import call

T = TypeVar("T")
CONNECT_S = 5.0
ENDING_S = 10.0  # by which nodes may be later than the first
REPORT_MARK = '\n  "nodes": ['  # in every report


@dataclass(frozen=True)
class DoctorConfig(LaunchConfig):
    """`python -m launch doctor`."""

    shared: str | None = None  # folder that all nodes share
    bucket: str | None = None  # s3://bucket or s3://bucket/folder
    timeout_s: float = within(5, 86_400, 60.0)  # for a node to come, for its report, and for the transfers of a pair
    megabytes: float = within(1e-6, 100_000, 32.0)  # 1e6 bytes, sent between two nodes at most
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    report: str | None = None  # file for all findings, as JSON

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
    of_runs = {setting.name for setting in fields(TrainConfig)} - {setting.name for setting in fields(DoctorConfig)}
    return build(DoctorConfig, {name: value for name, value in merge_args(args).items() if name not in of_runs})


def doctor(args: list[str]) -> int:
    """Examine every node before a run: configs/machines/X.yaml shared=FOLDER bucket=s3://... timeout_s= megabytes="""
    config = read_doctor(args)
    if config.machine.kind != "local" or config.script or config.dry_run:
        return config.machine.start(doctor_job(config, args), config.script, config.dry_run)
    status = _run(config)
    if dist.is_initialized():  # after a failure: NCCL would wait for a lost peer
        os._exit(status)
    return status


def doctor_job(config: DoctorConfig, args: Sequence[str]) -> Job:
    """For a scheduler: every node runs the doctor of a local machine, told which of them it is."""
    passed_on = [arg for arg in args if arg.partition("=")[0] not in ("script", "dry_run")]

    def line(rank: str | None, host: str | None) -> list[str]:
        settings = {"node_rank": rank, "host": host}
        node = [Shell(f"machine.{name}={quoted(value)}") for name, value in settings.items() if value is not None]
        return ["python", "-m", "launch", "doctor", *passed_on, "machine.kind=local", *node]

    return Job(f"{config.machine.name}-doctor", line, limit_s=5 * config.timeout_s + 60)


def _run(config: DoctorConfig) -> int:
    """Examines this machine as one of the nodes, and prints the findings on node 0; the exit status."""
    node = config.machine.node_rank
    if config.report and node == 0:
        require_own(config.report, REPORT_MARK)
    os.environ.update(config.machine.environment)  # interfaces, credentials: what the run's processes would have
    try:
        report = examine(config)
    except (ConnectionError, RuntimeError, UserError) as error:  # the first node is not there, or no longer
        show(f"problem: node {node}: {one_line(error)}")
        return 1
    if node != 0:
        show(f"node {node}: examined; the findings are node 0's")
        return 0
    issues = find_issues(report, config.machine, config.limits)
    lines = [report_text(report), "", *(f"problem: {issue}" for issue in issues)]
    show("\n".join([*lines, f"problems found: {len(issues)}" if issues else "no problem found"]))
    if config.report:
        write_text(config.report, json.dumps(to_dict(report), indent=2))
    return 1 if issues else 0


def show(text: str) -> None:
    """Prints `text`, parts of which other nodes have sent, without what would steer a terminal."""
    print("".join(c if c.isprintable() or c == "\n" else "?" for c in text), flush=True)


def examine(config: DoctorConfig) -> ClusterReport:
    """What all nodes find out about themselves and each other."""
    cluster, node, limit_s, host = config.machine, config.machine.node_rank, config.timeout_s, address(os.environ)
    store = join_nodes(cluster, limit_s)
    with listen("" if cluster.nodes > 1 else LOOPBACK, 0) as listener:  # to be probed
        introduction = NodeAddress(socket.gethostname(), host, listener.getsockname()[1])
        addresses = all_gather(store, node, range(cluster.nodes), "address", introduction, limit_s)
        # It names files: the ports make it new, and no node can choose it.
        token = hashlib.sha256(repr(addresses).encode()).hexdigest()[:12]
        report = look_around(config, addresses, token)
        reports = all_gather(store, node, addresses, "report", report, limit_s + ENDING_S)
    for path in config.paths:
        with suppress(OSError):  # it could not be written
            storage.remove(probe_file(path, token, node))
    late = {True: "came, but was not heard of again", False: f"did not come in {limit_s:g} s"}
    lost = {str(i): late[i in addresses] for i in range(cluster.nodes) if i not in reports}
    links, unmeasured = Links(), ""
    if lost or any(report.unreached for report in reports.values()):
        unmeasured = "not all nodes have reported" if lost else "not all nodes reach each other"
    elif cluster.nodes > 1:
        show(f"measuring links between {cluster.nodes} nodes")
        try:
            links = measure(store, node, cluster.nodes, config.megabytes, limit_s)
        except (ConnectionError, RuntimeError) as error:
            if node != 0:
                raise
            unmeasured = one_line(error)
    store.set(f"done/{node}", "")
    if node == 0:  # with whose process the store ends
        with suppress(DistStoreError):
            store.wait([f"done/{other}" for other in reports], timedelta(seconds=ENDING_S))
    return ClusterReport(tuple(reports.values()), lost, links, unmeasured)


def look_around(config: DoctorConfig, addresses: Mapping[int, NodeAddress], token: str) -> NodeReport:
    """This node, and what it sees of the others."""
    node, limit_s = config.machine.node_rank, config.timeout_s
    kind, gpu_free = call("looking at GPUs", limit_s, gpus)
    disk_gib = call("looking at the disk", limit_s, free_gib, config.shared or ".")
    paths = [
        call(f"writing to {path} and reading it", limit_s, probe_path, path, token, node, addresses)
        for path in config.paths
    ]
    with ThreadPoolExecutor(16) as pool:
        errors = pool.map(connection_error, addresses.values())
    unreached = [
        f"node {i} ({other.host}) at {other.address}: {error}"
        for (i, other), error in zip(addresses.items(), errors, strict=True)
        if error
    ]
    own, versions = addresses[node], {**software(), GPUS: kind}
    seen = (gpu_free, disk_gib, free_gib("/dev/shm"), tuple(paths), tuple(unreached))
    return NodeReport(node, own.host, own.address, versions, *seen)


def connection_error(node: NodeAddress) -> str:
    """Why there is no connection to a port that the node chose freely, as gloo and NCCL do; empty if there is one."""
    try:
        socket.create_connection((node.address, node.port), timeout=CONNECT_S).close()
    except OSError as error:
        return str(error)
    return ""


def join_nodes(cluster: Cluster, limit_s: float) -> TCPStore:
    """The store through which the nodes talk, at the run's own port. Raises ConnectionError with one line."""
    deadline, timeout, where = time.monotonic() + limit_s, timedelta(seconds=2 * limit_s), (cluster.host, cluster.port)
    if cluster.node_rank == 0:
        try:
            return serve_store(*where, cluster.nodes, timeout)
        except OSError as error:
            fix = "end what holds it (`ss -ltnp`), or give machine.port another number on all nodes"
            raise ConnectionError(f"port {cluster.port} cannot be listened on ({error}); {fix}") from error
    while True:
        try:
            socket.create_connection(where, timeout=limit_s).close()  # torch's own waiting is loud
            return TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timeout)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline - 1:
                fix = "start the doctor there too, open the port, or give machine.host a name that all nodes know"
                where = f"{cluster.host}:{cluster.port} of node 0"
                raise ConnectionError(f"{where} not reached within {limit_s:g} s ({error}); {fix}") from error
            time.sleep(1)


def all_gather(store: Store, node: int, nodes: Iterable[int], name: str, value: T, limit_s: float) -> dict[int, T]:
    """The value of every one of `nodes`, on every node, without those that gave none within `limit_s`. UserError for a
    message that is damaged."""
    keys, in_time = {i: f"{name}/{i}" for i in nodes}, f"{name}/in time"
    store.set(keys[node], json.dumps(to_dict(value)))
    if node == 0:
        with suppress(DistStoreError):
            store.wait([*keys.values()], timedelta(seconds=limit_s))
        store.set(in_time, " ".join(key for key in keys.values() if store.check([key])))
    heard = store.get(in_time).decode().split()  # waits for node 0
    if keys[node] not in heard:
        raise ConnectionError(f"came {limit_s:g} s or more after node 0; start all at once, or raise timeout_s")
    texts = {i: store.get(key) for i, key in keys.items() if key in heard}
    return {i: build_from(type(value), parse_object(text, f"node {i}"), f"node {i}") for i, text in texts.items()}
