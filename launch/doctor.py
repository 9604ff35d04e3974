"""Examines the machines of a run, every node at once, before anything is queued."""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from typing import TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from configs import build, build_from, merge_args, storage, to_dict
from configs.errors import UserError, one_line
from configs.files import write_text
from configs.foreign import parse_object, reading
from configs.storage import is_s3
from launch.cluster_report import ClusterReport, LimitsConfig, NodeReport, find_issues, obstacle, report_text
from launch.links import Measurement, Phase, measure
from launch.machine import MachineConfig
from launch.node import address, inspect_node, probe_connectivity, probe_file, probe_path
from launch.rendezvous import LOOPBACK, listen, own_address, serve_store
from launch.scheduler import Cluster, Job, Shell, quoted, require_own
from train.config import TrainConfig

T = TypeVar("T")
STUCK = "work with a time limit"  # name of a thread
ENDING_S = 10.0  # by which nodes may be later than the first
REPORT_MARK = '  "nodes": ['  # a line of a report begins so
CPP_LINE = re.compile(r"^\[[^]]+:\d+\] ")  # which gloo begins its errors with


@dataclass(frozen=True)
class DoctorConfig:
    """`python -m launch doctor`."""

    machine: MachineConfig
    shared: str | None = None  # folder that all nodes share
    bucket: str | None = None  # s3://bucket or s3://bucket/folder
    timeout_s: float = 60.0  # for a node to come, for its report, and for all transfers together
    megabytes: float = 32.0  # 1e6 bytes, sent between two nodes at most
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    report: str | None = None  # file for all findings, as JSON
    dry_run: bool = False  # only print what would be started
    script: str | None = None  # file for the Slurm script or the Kubernetes manifests; none: they are printed

    def __post_init__(self) -> None:
        if not 5 <= self.timeout_s <= 86_400:
            raise UserError(f"timeout_s={self.timeout_s:g} must be 5 or more and at most a day")
        if not 0 < self.megabytes <= 100_000:
            raise UserError(f"megabytes={self.megabytes:g} must be above 0 and at most 100000")
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
    token: str  # names the files that it writes

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w{1,32}", self.token):
            raise UserError(f"the token {self.token!r} must be letters and digits")


@dataclass(frozen=True)
class Present:
    """The nodes that have come in time."""

    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Findings:
    """What a node has to report, or why it has nothing."""

    report: NodeReport | None
    error: str


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
    if any(thread.name == STUCK for thread in threading.enumerate()):
        os._exit(status)  # a thread that waits for a lost peer cannot be ended, and NCCL would wait for it
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
    if report is None:
        print(f"node {node}: examined; the table is node 0's", flush=True)
        return 0
    if config.report:
        write_text(config.report, json.dumps(to_dict(report), indent=2))
    issues = find_issues(report, config.machine, config.limits)
    lines = [report_text(report), "", *(f"problem: {issue}" for issue in issues)]
    count = f"{len(issues)} problem{'s' if len(issues) > 1 else ''}" if issues else "no problem found"
    hints = {"shared=FOLDER": config.shared, "bucket=s3://...": config.bucket}
    missing = [hint for hint, path in hints.items() if not path]
    lines.append(count + (f"; not looked at: give {' and '.join(missing)}" if missing else ""))
    print(printable("\n".join(lines)), flush=True)
    return 1 if issues else 0


def printable(text: str) -> str:
    """`text` without what would steer a terminal: other nodes have said parts of it."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def examine(config: DoctorConfig) -> ClusterReport | None:
    """All findings on the first node, none on the others."""
    cluster, node, limit_s, token = config.machine, config.machine.node_rank, config.timeout_s, uuid.uuid4().hex[:12]
    store, where = join_nodes(cluster, limit_s), address(os.environ)
    with listen((cluster.nodes > 1 and own_address(where)) or LOOPBACK, 0) as listener:  # to be probed
        own = NodeAddress(socket.gethostname(), where, listener.getsockname()[1], token)
        peers = all_gather(store, cluster, "address", own, limit_s)
        report, error = run_with_timeout(limit_s, partial(_look_around, config, peers))
        findings = all_gather(store, cluster, "findings", Findings(report, error), limit_s + ENDING_S)
    store.set(f"done/{node}", "")
    for path in config.paths if report else ():
        with suppress(OSError):  # it could not be written
            storage.remove(probe_file(path, token))
    reports = [finding.report for finding in findings.values() if finding.report]
    if any(report.node not in peers or len(report.paths) != len(config.paths) for report in reports):
        raise ConnectionError("a node reports what it was not asked; start the same doctor on all nodes")
    unmeasured = obstacle(reports, cluster)
    measured = _measure_links(config, store, findings) if not unmeasured and cluster.nodes > 1 else {}
    if node != 0:
        return None
    wait_for(store, [f"done/{peer}" for peer in findings], ENDING_S)  # the store ends with this process
    lost = {str(peer): finding.error for peer, finding in findings.items() if finding.error}
    for peer in set(range(cluster.nodes)) - set(findings):
        how = "came, but was not heard of again" if peer in peers else "did not come"
        lost[str(peer)] = f"{how} within {limit_s:g} s"
    return ClusterReport(tuple(reports), lost, measured, unmeasured)


def _measure_links(config: DoctorConfig, store: Store, nodes: Iterable[int]) -> dict[str, Measurement]:
    """What each node has measured, on the first node; the others raise ConnectionError if they could not."""
    cluster, timeout = config.machine, timedelta(seconds=config.timeout_s)
    print(f"measuring links between {cluster.nodes} nodes", flush=True)
    links = PrefixStore("links", store)
    work = partial(measure, links, cluster.node_rank, cluster.nodes, config.megabytes, timeout)
    result, error = run_with_timeout(config.timeout_s + ENDING_S, work)
    put(store, f"measured/{cluster.node_rank}", result or Measurement(error=error))
    if cluster.node_rank != 0:
        if error:
            raise ConnectionError(error)
        return {}
    keys = {str(node): f"measured/{node}" for node in nodes}
    wait_for(store, [*keys.values()], ENDING_S)  # the others end before the store does
    return {node: take(store, key, Measurement) for node, key in keys.items() if store.check([key])}


def _look_around(config: DoctorConfig, peers: dict[int, NodeAddress], phase: Phase) -> NodeReport:
    """This node, and what it sees of the others."""
    node = config.machine.node_rank
    phase.name = "looking at GPUs, memory and disks"
    facts = inspect_node(config.shared)
    phase.name = "opening connections to the other nodes"
    unreached = probe_connectivity({peer: (where.address, where.port) for peer, where in peers.items() if peer != node})
    tokens, paths = {peer: where.token for peer, where in peers.items()}, []
    for path in config.paths:
        phase.name = f"writing to {path} and reading what the others write there"
        paths.append(probe_path(path, node, tokens))
    return NodeReport(node, peers[node].host, peers[node].address, facts, tuple(paths), unreached)


def run_with_timeout(limit_s: float, work: Callable[[Phase], T]) -> tuple[T | None, str]:
    """The result of `work` and "", or None and one line: what failed, or what it was doing when the time was over.

    It runs in a thread that cannot be ended, and that does not keep the process from ending.
    """
    phase, results, errors = Phase(), list[T](), list[str]()

    def run() -> None:
        try:
            results.append(work(phase))
        except (RuntimeError, OSError, ValueError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            errors.append(f"{phase.name} failed: {CPP_LINE.sub('', first)[:300]}")

    thread = threading.Thread(target=run, daemon=True, name=STUCK)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0], ""
    if thread.is_alive():
        return None, f"{phase.name} did not end within {limit_s:g} s"
    return None, errors[0] if errors else f"{phase.name} broke off, see the traceback"


def join_nodes(cluster: Cluster, limit_s: float) -> TCPStore:
    """The store through which the nodes talk, at the run's own port. Raises ConnectionError with one line."""
    deadline, timeout = time.monotonic() + limit_s, timedelta(seconds=limit_s)
    if cluster.node_rank == 0:
        try:
            return serve_store(cluster.host, cluster.port, cluster.nodes, timeout)
        except OSError as error:
            raise ConnectionError(
                f"port {cluster.port} of this node cannot be listened on ({error}); end what holds it (`ss -ltnp` "
                "shows it), or give machine.port another number on all nodes"
            ) from error
    while True:
        try:
            socket.create_connection((cluster.host, cluster.port), timeout=limit_s).close()  # torch's waiting is loud
            return TCPStore(cluster.host, cluster.port, is_master=False, wait_for_workers=False, timeout=timeout)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline - 1:
                raise ConnectionError(
                    f"{cluster.host}:{cluster.port} of node 0 was not reached within {limit_s:g} s ({error}); start "
                    "the doctor there too, open the port in the firewall, or set machine.host to a name or address "
                    "that all nodes know"
                ) from error
            time.sleep(1)


def all_gather(store: Store, cluster: Cluster, name: str, value: T, limit_s: float) -> dict[int, T]:
    """The value of every node, on every node, without those that gave none within `limit_s`."""
    node, keys = cluster.node_rank, {peer: f"{name}/{peer}" for peer in range(cluster.nodes)}
    put(store, keys[node], value)
    if node == 0:
        wait_for(store, [*keys.values()], limit_s)
        put(store, name, Present(tuple(peer for peer, key in keys.items() if store.check([key]))))
    elif not wait_for(store, [name], 2 * limit_s):
        raise ConnectionError(f"node 0 has not answered within {2 * limit_s:g} s")
    present = take(store, name, Present).nodes
    if node not in present:
        raise ConnectionError(f"came {limit_s:g} s or more after node 0; start all at once, or raise timeout_s")
    return {peer: take(store, keys[peer], type(value)) for peer in present}


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
