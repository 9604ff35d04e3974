"""Two nodes on one machine: network namespaces joined by a cable that can be pulled, one process in each."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from tiny_training import ROOT, launch, losses, run

from launch.command import accelerate_words, environment
from launch.machine import MachineConfig
from model.weights import load_weights
from sampling.world_model import newest_checkpoint
from train.config import EngineConfig

SETTINGS = ["batch=1", "accumulation=2", "checkpoint.every=2", "validation.every=100", "steps=40"]
TIMEOUT_S = 8

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]


def sh(line: str) -> None:
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr}"


@dataclass
class Nodes:
    """Two namespaces; each knows the other as node0 and node1."""

    names: tuple[str, str]

    def start(self, node: int, words: list[str], log: Path) -> subprocess.Popen[bytes]:
        machine = MachineConfig(nodes=2, processes=1, device="cpu", node_rank=node, host="node0", port=29517)
        line = accelerate_words(machine, EngineConfig(), words)
        inside = ["ip", "netns", "exec", self.names[node], "unshare", "-u", "sh", "-c",
                  f'hostname node{node}; exec "$@"', "sh", *line]  # fmt: skip
        env = {**os.environ, **environment(machine), "OMP_NUM_THREADS": "1"}
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
        for one in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def wait_for_steps(out: Path, more: int, running: list[subprocess.Popen[bytes]]) -> None:
    """Until `metrics.jsonl` has that many more lines than the newest checkpoint has steps."""
    done = [int(folder.name[5:]) for folder in out.glob("step_*")]
    target = max(done, default=0) + more
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in running):
        metrics = out / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= target:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {target} steps in {out}")


def wait_for_line(log: Path, text: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [line for line in log.read_text(errors="replace").splitlines() if text in line] if log.exists() else []
        if found:
            return found[-1]
        time.sleep(0.1)
    raise AssertionError(f"no line with {text!r} in {log}: {log.read_text(errors='replace')[-3000:]}")


def test_two_nodes_lose_the_cable_and_then_a_node_and_end_as_if_nothing_had_been(
    nodes: Nodes, train_words, tmp_path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = run([*launch("cpu_zero2", "-m", "train"), *train_words, *SETTINGS, f"out={whole}"])
    assert done.returncode == 0, done.stderr[-2000:]
    words = [*train_words, *SETTINGS, f"out={out}", f"engine.timeout_s={TIMEOUT_S}"]

    def start(attempt: str) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
        logs = [tmp_path / f"{attempt}_{node}.log" for node in range(2)]
        return [nodes.start(node, words, logs[node]) for node in range(2)], logs

    running, logs = start("cable")
    wait_for_steps(out, 3, running)
    nodes.cable("down")
    pulled = time.monotonic()
    said = [wait_for_line(log, "stops in step", 4 * TIMEOUT_S + 30) for log in logs]
    print(f"\ncable pulled; both had stopped {time.monotonic() - pulled:.1f} s later")
    print("\n".join(said))
    assert "missing: rank 1" in said[0] and "missing: rank 0" in said[1]
    nodes.cable("up")
    for process in running:
        kill_node(process)

    running, logs = start("node")
    wait_for_steps(out, 3, running)
    kill_node(running[1])
    killed = time.monotonic()
    line = wait_for_line(logs[0], "stops in step", 4 * TIMEOUT_S + 30)
    print(f"node 1 killed; node 0 had stopped {time.monotonic() - killed:.1f} s later")
    print(line)
    assert "missing: rank 1" in line
    kill_node(running[0])

    running, logs = start("end")
    for process, log in zip(running, logs, strict=True):
        assert process.wait(timeout=300) == 0, log.read_text(errors="replace")[-3000:]
    resumed = wait_for_line(logs[0], "resumed from", 1)
    print(resumed.rpartition("\r")[2].strip())
    assert torch.equal(losses(out), losses(whole))
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (load_weights(newest_checkpoint(folder) / name) for folder in (out, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
