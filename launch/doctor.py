"""Whether the machines of a run can bear it, found out on every node before anything is queued."""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import psutil

from configs import build, merge_args, to_dict
from configs.errors import UserError, one_line
from configs.files import write_text
from configs.foreign import parse_object
from configs.storage import is_s3
from launch.diagnosis import Examination, LimitsConfig, NodeReport, find_problems, obstacle
from launch.links import RankReport, Ranks
from launch.machine import MachineConfig
from launch.meeting import Answer, Meeting, meet
from launch.mesh import Door, Hello, door_name, knock
from launch.node import address, inspect_node
from launch.places import Trial
from launch.rendezvous import LOOPBACK, own_address
from launch.run import accelerate_line
from launch.scheduler import Job, Shell, quoted, require_own
from launch.tables import examination_text, printable
from launch.timed import Doing, within
from train.config import EngineConfig, TrainConfig

STARTING_S = 120.0  # that the processes may take to start, besides timeout_s
REPORT_MARK = '  "nodes": ['  # a line of a report begins so
ENDING_S = 10.0  # that the launcher may take to end


@dataclass(frozen=True)
class DoctorConfig:
    """What `python -m launch doctor` is told."""

    machine: MachineConfig
    engine: EngineConfig = field(default_factory=EngineConfig)  # a machine's file may say it
    shared: str | None = None  # folder that all nodes share
    bucket: str | None = None  # s3://bucket or s3://bucket/folder
    timeout_s: float = 60.0  # for a node to come, for its report, and for all transfers together
    megabytes: float = 64.0  # 1e6 bytes, sent between two ranks at most
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    report: str | None = None  # file for all findings, as JSON
    dry_run: bool = False  # only print what would be started
    script: str | None = None  # file for the Slurm script or the Kubernetes manifests; none: they are printed

    def __post_init__(self) -> None:
        if not (5 <= self.timeout_s <= 86_400 and 0 < self.megabytes <= 100_000):
            raise UserError(
                f"timeout_s={self.timeout_s:g} must be 5 or more and at most a day, megabytes={self.megabytes:g} above "
                "0 and at most 100000"
            )
        if self.bucket and not is_s3(self.bucket):
            raise UserError(f"bucket={self.bucket} must begin with s3://; a folder is given as shared=")

    @property
    def places(self) -> list[str]:
        return [place for place in (self.shared, self.bucket) if place]

    @property
    def most_s(self) -> float:
        """The longest that it may take: to meet, to report, to start and to measure, to end."""
        return 3 * self.timeout_s + STARTING_S + ENDING_S


@dataclass(frozen=True)
class Told:
    """What a node tells the first one in the end."""

    report: NodeReport | None
    error: str  # why there is no report


def read_doctor(words: Sequence[str]) -> DoctorConfig:
    """The doctor's settings; those that only a run has are passed over, since a machine's file may hold them."""
    merged = merge_args(words)
    if "machine" not in merged:
        raise UserError("no machine: begin with a file of configs/machines")
    of_runs = {one.name for one in fields(TrainConfig)} - {one.name for one in fields(DoctorConfig)}
    return build(DoctorConfig, {name: value for name, value in merged.items() if name not in of_runs})


def doctor(words: list[str]) -> int:
    """Examine every node before a run: configs/machines/X.yaml shared=FOLDER bucket=s3://... timeout_s= megabytes="""
    config = read_doctor(words)
    return config.machine.start(doctor_job(config, words), config.script, config.dry_run)


def doctor_job(config: DoctorConfig, words: Sequence[str]) -> Job:
    """For a scheduler: every node runs the doctor of a local machine, told which of them it is."""
    mine = [word for word in words if word.partition("=")[0] not in ("script", "dry_run")]

    def line(rank: str | None, host: str | None) -> list[str]:
        if rank is None or host is None:
            return ["python", "-m", "launch", "doctor", *mine]
        where = [Shell(f"machine.node_rank={quoted(rank)}"), Shell(f"machine.host={quoted(host)}")]
        return ["python", "-m", "launch", "doctor", *mine, "machine.kind=local", *where]

    return Job(f"{config.machine.name}-doctor", line, limit_s=config.most_s, here=partial(_here, config))


def _here(config: DoctorConfig) -> int:
    machine = config.machine
    if config.report and machine.node_rank == 0:
        require_own(config.report, REPORT_MARK)
    os.environ.update(machine.environment)  # interfaces, credentials: what the run's processes would have
    try:
        found = _examine(config, meet(machine, config.timeout_s))
    except (ConnectionError, RuntimeError) as error:  # the first node is not there, or no longer
        print(f"problem: node {machine.node_rank}: {one_line(error)}", flush=True)
        return 1
    if found is None:
        print(f"node {machine.node_rank}: examined; the table is node 0's", flush=True)
        return 0
    if config.report:
        write_text(config.report, json.dumps(to_dict(found), indent=2))
    problems = find_problems(found, machine, config.limits)
    print(printable(examination_text(found, machine)) + "\n")
    for problem in problems:
        print(printable(f"problem: {problem}"))
    places = {"shared=FOLDER": config.shared, "bucket=s3://...": config.bucket}
    left_out = [name for name, given in places.items() if not given]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "no problem found"
    print(count + (f"; not looked at: give {' and '.join(left_out)}" if left_out else ""))
    return 1 if problems else 0


def _examine(config: DoctorConfig, meeting: Meeting) -> Examination | None:
    """All findings on the first node, none on the others."""
    node, limit_s = meeting.node, config.timeout_s
    where = address(os.environ)
    door = Door(door_name(node), (meeting.nodes > 1 and own_address(where)) or LOOPBACK)
    own = Hello(socket.gethostname(), where, door.port)
    meeting.tell("hello", own)
    if node == 0:
        here = meeting.hear("hello", Hello, range(meeting.nodes), limit_s)
        trial = meeting.decide("trial", Trial(uuid.uuid4().hex[:12], tuple(here), limit_s))
    else:
        trial = meeting.learn("trial", Trial, 2 * limit_s)
        if node not in trial.nodes:
            raise ConnectionError(f"came {limit_s:g} s or more after node 0; start all at once, or raise timeout_s")
    report, error = within(limit_s, partial(_look_around, config, meeting, own, trial))
    meeting.tell("report", Told(report, error))
    found = _hear_reports(config, meeting, trial) if node == 0 else None
    if found:
        go = meeting.decide("go", Answer(not found.unmeasured and config.machine.ranks > 1))
    else:
        go = meeting.learn("go", Answer, 2 * limit_s)
    for place in config.places if report else ():
        trial.clear(place, node)
    door.close()
    meeting.leave(trial.nodes)
    if not go.yes:
        return found
    ranks, why = _measure(config)
    if not found and (errors := [why, *(one.error for one in ranks)]) != [""] * len(errors):
        raise ConnectionError("; ".join(filter(None, errors)))
    return found and replace(found, ranks=ranks, unmeasured=why)


def _look_around(config: DoctorConfig, meeting: Meeting, own: Hello, trial: Trial, doing: Doing) -> NodeReport:
    """This node, and what it sees of the others."""
    doing.name = "looking at GPUs, memory and disks"
    facts = inspect_node(config.shared)
    doing.name = "opening connections to the other nodes"
    hellos = meeting.hear("hello", Hello, trial.nodes, 0)
    unreached = knock({node: hello for node, hello in hellos.items() if node != meeting.node})
    places = tuple(trial.of(url, meeting, doing) for url in config.places)
    return NodeReport(meeting.node, own.host, own.address, facts, places, unreached)


def _hear_reports(config: DoctorConfig, meeting: Meeting, trial: Trial) -> Examination:
    said = meeting.hear("report", Told, trial.nodes, config.timeout_s)
    reports = [one.report for one in said.values() if one.report]
    if any(one.node not in trial.nodes or len(one.places) != len(config.places) for one in reports):
        raise ConnectionError("a node reports what it was not asked; start the same doctor on all nodes")
    lost = {str(node): one.error for node, one in said.items() if not one.report}
    for node in range(meeting.nodes):
        if node not in said:
            what = "came, but was not heard of again" if node in trial.nodes else "did not come"
            lost[str(node)] = f"{what} within {config.timeout_s:g} s"
    return Examination(tuple(reports), lost, (), obstacle(reports, lost, config.machine))


def links_line(config: DoctorConfig, report: str) -> list[str]:
    """The exact line that would start a run on this node, with the measurement in the run's place."""
    machine = config.machine
    words = [f"report={report}", f"device={machine.device}", f"megabytes={config.megabytes}"]
    words += [f"timeout_s={config.timeout_s}"]
    return accelerate_line(machine, config.engine.name, words, program=("launch", "links"))


def _measure(config: DoctorConfig) -> tuple[tuple[RankReport, ...], str]:
    """What the ranks say (on the first node all of them), or why they say nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "links.json"
        line = links_line(config, str(report))
        print(shlex.join(line), flush=True)
        # Launchers that do not end at the same moment complain of each other at length, after all is done.
        env = {**os.environ, "LOGLEVEL": "CRITICAL"}
        process = subprocess.Popen([sys.executable, *line[1:]], start_new_session=True, env=env)
        deadline = time.monotonic() + config.timeout_s + STARTING_S
        try:
            while not report.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            if report.exists():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING_S)
                return build(Ranks, parse_object(report.read_bytes(), report)).ranks, ""
            how = "did not end" if process.poll() is None else f"ended with status {process.returncode}, see above"
        finally:
            _end(process)
    return (), f"accelerate launch gave nothing and {how}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)  # not for ever: a process that waits for a dead file system cannot be killed
