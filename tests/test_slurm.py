"""A real Slurm of two nodes on one machine (network namespaces) takes, runs, warns and queues again what we render."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_training import ROOT, launch, losses, run
from two_nodes import LOOSE, SETTINGS, Nodes, kill_node, wait_for_steps

from launch.run import read_launch

pytest_plugins = ["two_nodes"]  # the fixture `nodes`
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
MACHINE = [
    "configs/machines/slurm.yaml", "machine.nodes=2", "machine.processes=1", "machine.device=cpu",
    "machine.slurm.cpus_per_task=1", "machine.env.OMP_NUM_THREADS=1",
]  # fmt: skip

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.geteuid() != 0 or any(shutil.which(one) is None for one in PROGRAMS), reason=f"needs root, ip and: {INSTALL}"
    ),
]

# One CPU per node is enough; jobs queued again begin as soon as their credentials have expired.
CONFIG = """
ClusterName=tests
SlurmctldHost=node0(10.77.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=node0 NodeAddr=10.77.0.1 CPUs=1 State=UNKNOWN
NodeName=node1 NodeAddr=10.77.0.2 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """The daemons' folder, and Slurm's commands on the first node."""

    nodes: Nodes
    folder: Path

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        inside = ["ip", "netns", "exec", self.nodes.names[0], *words]
        return subprocess.run(inside, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    def submit(self, *words: str) -> str:
        """The number of the job that `python -m launch` of these words has submitted."""
        done = self.ask("python", "-m", "launch", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def state(self, job: str) -> str:
        said = self.ask("scontrol", "--oneliner", "show", "job", job).stdout
        return next(word.partition("=")[2] for word in said.split() if word.startswith("JobState="))

    def wait(self, job: str, state: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while (found := self.state(job)) != state:
            assert time.monotonic() < deadline and found not in ("FAILED", "TIMEOUT", "CANCELLED"), found
            time.sleep(0.2)


@pytest.fixture
def slurm(nodes: Nodes, tmp_path) -> Iterator[Slurm]:
    folder, running = tmp_path / "slurm", []
    for name in ("state", "spool/node0", "spool/node1"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # its own search fails inside the namespaces
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    files = [f"--{word}={folder / name}" for word, name in names.items()]
    munged = ["munged", "--force", "--foreground", *files, f"--log-file={folder / 'munge.log'}"]
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    try:
        for node, line in ((0, munged), (0, ["slurmctld", "-D"]), (0, ["slurmd", "-D"]), (1, ["slurmd", "-D"])):
            running.append(nodes.inside(node, line, folder / f"{line[0]}_{node}.log", env))
            time.sleep(0.5)
        cluster, deadline = Slurm(nodes, folder), time.monotonic() + 60
        while cluster.ask("sinfo", "--noheader", "--format=%t %D").stdout.split() != ["idle", "2"]:
            assert time.monotonic() < deadline, [path.read_text()[-1000:] for path in folder.glob("*.log")]
            time.sleep(0.2)
        yield cluster
    finally:
        for process in reversed(running):
            kill_node(process)


def test_slurm_takes_what_is_rendered_for_it_and_refuses_what_it_has_not(slurm: Slurm, train_words, tmp_path) -> None:
    words = [*MACHINE, *train_words, f"out={tmp_path / 'out'}"]

    def tested(*more: str) -> subprocess.CompletedProcess[str]:
        asked = read_launch([*words, *more])
        (tmp_path / "job.sh").write_text(asked.machine.render(asked.job))
        return slurm.ask("sbatch", "--test-only", str(tmp_path / "job.sh"))

    assert tested().returncode == 0
    assert tested("machine.nodes=3").returncode != 0
    assert tested("machine.slurm.partition=nowhere").returncode != 0


def test_a_run_under_slurm_that_is_warned_is_saved_queued_again_and_ends_as_if_nothing_had_been(
    slurm: Slurm, train_words, tmp_path
) -> None:
    whole, out, script = tmp_path / "whole", tmp_path / "out", tmp_path / "job.sh"
    done = run([*launch("cpu_zero2", "-m", "train"), *train_words, *SETTINGS, f"out={whole}"])
    assert done.returncode == 0, done.stderr[-2000:]
    words = [*MACHINE, f"machine.slurm.logs={tmp_path / 'logs'}", *train_words, *SETTINGS, f"out={out}"]
    words += ["engine.stage=2", "engine.precision=fp32"]  # not the file's, but those of `whole`
    job = slurm.submit(*words, f"script={script}")
    slurm.wait(job, "RUNNING")
    wait_for_steps(out, 3, [])
    assert slurm.ask("scancel", "--signal=USR1", job).returncode == 0  # as --signal does before the end of the time
    slurm.wait(job, "PENDING")  # the script has queued it again
    assert (out / "STOPPED").exists()
    slurm.wait(job, "COMPLETED")
    log = (tmp_path / "logs" / f"worldloom_{job}.log").read_text(errors="replace")  # both nodes' bars, mixed
    said = [line.rpartition("\r")[2].strip() for line in log.splitlines()]
    print(*(line for line in said if "stopped at step" in line or "resumed from" in line), sep="\n")
    assert any("stopped at step" in line for line in said) and any("resumed from" in line for line in said)
    assert torch.equal(losses(out), losses(whole))


def test_the_doctor_examines_the_nodes_of_a_slurm_job(slurm: Slurm, tmp_path) -> None:
    (tmp_path / "shared").mkdir()
    given = [f"shared={tmp_path / 'shared'}", f"machine.slurm.logs={tmp_path / 'logs'}", *LOOSE]
    given += ["timeout_s=30", f"script={tmp_path / 'job.sh'}"]
    job = slurm.submit("doctor", *MACHINE, *given)
    slurm.wait(job, "COMPLETED")
    log = (tmp_path / "logs" / f"worldloom-doctor_{job}.log").read_text()
    print(log)
    assert "no problem found" in log and "node 0 (node0) -> node 1 (node1): " in log
    assert "node 1: examined; the findings are node 0's" in log
