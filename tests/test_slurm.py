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
from two_nodes import LOOSE, SETTINGS, Nodes, kill_node, wait_for_steps, wait_until

pytest_plugins = ["two_nodes"]  # the fixture `nodes`
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
MACHINE = [
    "configs/machines/slurm.yaml", "machine.nodes=2", "machine.processes=1", "machine.device=cpu",
    "machine.slurm.cpus_per_task=1", "machine.env.OMP_NUM_THREADS=1",
]  # fmt: skip

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0 or bool(MISSING), reason=f"needs root, {', '.join(MISSING)}: {INSTALL}"),
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

    def ask(self, *args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        inside = ["ip", "netns", "exec", self.nodes.names[0], *args]
        return subprocess.run(inside, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    def submit(self, *args: str) -> str:
        """The number of the job that `python -m launch` with these arguments has submitted."""
        done = self.ask("python", "-m", "launch", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def state(self, job: str) -> str:
        output = self.ask("scontrol", "--oneliner", "show", "job", job).stdout
        return next(word.partition("=")[2] for word in output.split() if word.startswith("JobState="))

    def wait(self, job: str, state: str) -> None:
        wait_until(lambda: self.state(job) in (state, "FAILED", "TIMEOUT", "CANCELLED"), 180)
        assert self.state(job) == state


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
        cluster = Slurm(nodes, folder)
        wait_until(lambda: cluster.ask("sinfo", "--noheader", "--format=%t %D").stdout.split() == ["idle", "2"], 60)
        yield cluster
    finally:
        for process in reversed(running):
            kill_node(process)


def test_a_run_under_slurm_that_is_warned_is_saved_queued_again_and_ends_as_if_nothing_had_been(
    slurm: Slurm, train_args, tmp_path
) -> None:
    whole, out, script = tmp_path / "whole", tmp_path / "out", tmp_path / "job.sh"
    done = run([*launch("cpu_zero2", "-m", "train"), *train_args, *SETTINGS, f"out={whole}"])
    assert done.returncode == 0, done.stderr[-2000:]
    args = [*MACHINE, f"machine.slurm.logs={tmp_path / 'logs'}", *train_args, *SETTINGS, f"out={out}"]
    args += ["engine.stage=2", "engine.precision=fp32"]  # not the file's, but those of `whole`
    job = slurm.submit(*args, f"script={script}")
    slurm.wait(job, "RUNNING")
    wait_for_steps(out, 3, [])
    assert slurm.ask("scancel", "--signal=USR1", job).returncode == 0  # as --signal does before the end of the time
    slurm.wait(job, "PENDING")  # the script has queued it again
    assert (out / "STOPPED").exists()
    slurm.wait(job, "COMPLETED")
    log = (tmp_path / "logs" / f"worldloom_{job}.log").read_text(errors="replace")  # both nodes' bars, mixed
    print(*(line.rpartition("\r")[2] for line in log.splitlines() if "stopped at step" in line or "resumed" in line))
    assert "stopped at step" in log and "resumed from" in log
    assert torch.equal(losses(out), losses(whole))


def test_the_doctor_examines_the_nodes_of_a_slurm_job(slurm: Slurm, tmp_path) -> None:
    (tmp_path / "shared").mkdir()
    settings = [f"shared={tmp_path / 'shared'}", f"machine.slurm.logs={tmp_path / 'logs'}", *LOOSE]
    settings += ["timeout_s=30", f"script={tmp_path / 'job.sh'}"]
    job = slurm.submit("doctor", *MACHINE, *settings)
    slurm.wait(job, "COMPLETED")
    log = (tmp_path / "logs" / f"worldloom-doctor_{job}.log").read_text()
    print(log)
    assert "no problem found" in log and "node 0 (node0) -> node 1 (node1): " in log
    assert "node 1: examined; the findings are node 0's" in log
