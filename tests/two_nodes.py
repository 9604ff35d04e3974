"""Two nodes on one machine: network namespaces joined by a cable that can be pulled."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from tiny_training import ROOT

from launch.machine import MachineConfig
from launch.run import accelerate_line

T = TypeVar("T")
SETTINGS = ["batch=1", "accumulation=2", "checkpoint.every=2", "validation.every=100", "steps=40"]
# Not what is tested, and another machine may have less.
LOOSE = ["limits.mb_per_s=0", "limits.disk_gib=1"]


def sh(line: str) -> None:
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr}"


@dataclass
class Nodes:
    """Two namespaces; each knows the other as node0 and node1."""

    names: tuple[str, str]

    def start(self, node: int, args: list[str], log: Path) -> subprocess.Popen[bytes]:
        """A training run's processes on that node."""
        machine = MachineConfig(nodes=2, processes=1, device="cpu", node_rank=node, host="node0", port=29517)
        return self.inside(node, accelerate_line(machine, "deepspeed", args), log, machine.environment)

    def inside(
        self, node: int, line: list[str], log: Path, env: dict[str, str], first: str = ""
    ) -> subprocess.Popen[bytes]:
        """`line` on that node, with a name and mounts of its own; `first` is a line of shell that runs before."""
        shell = ["unshare", "-u", "-m", "sh", "-ec", f'hostname node{node}; {first} exec "$@"', "sh"]
        inside = ["ip", "netns", "exec", self.names[node], *shell, *line]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        with open(log, "ab") as file:
            return subprocess.Popen(inside, cwd=ROOT, stdout=file, stderr=file, env=env, start_new_session=True)

    def cable(self, state: str) -> None:
        sh(f"ip -n {self.names[1]} link set {self.names[1]} {state}")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    names = tuple(f"wl{os.getpid()}n{i}" for i in range(2))
    try:
        for name in names:
            sh(f"ip netns add {name} && ip -n {name} link set lo up")
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
        sh(f"ip link add {names[0]} type veth peer name {names[1]}")
        for i, name in enumerate(names):
            sh(f"ip link set {name} netns {name} && ip -n {name} addr add 10.77.0.{i + 1}/24 dev {name}")
            sh(f"ip -n {name} link set {name} up")
        yield Nodes((names[0], names[1]))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """All that a node runs, as when its power fails."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for each in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def wait_until(condition: Callable[[], T], seconds: float) -> T:
    """The first value of `condition` that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return value


def wait_for_steps(out: Path, more: int, running: list[subprocess.Popen[bytes]]) -> None:
    """Until `metrics.jsonl` has that many more lines than the newest checkpoint has steps."""
    target = max((int(folder.name[5:]) for folder in out.glob("step_*")), default=0) + more
    metrics = out / "metrics.jsonl"

    def trained() -> bool:
        assert all(process.poll() is None for process in running)
        return metrics.exists() and len(metrics.read_text().splitlines()) >= target

    wait_until(trained, 120)
