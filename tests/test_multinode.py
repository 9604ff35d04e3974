"""Two nodes, one process in each, lose the cable between them, a node, or what the doctor should find."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from tiny_training import launch, require_equal_bits, run
from two_nodes import LOOSE, SETTINGS, Nodes, kill_node, sh, wait_for_steps, wait_until

pytest_plugins = ["two_nodes"]  # the fixture `nodes`
TIMEOUT_S = 8

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]


def wait_for_line(log: Path, text: str, seconds: float) -> str:
    def matching() -> list[str]:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return [line for line in lines if text in line]

    return wait_until(matching, seconds)[-1]


def test_two_nodes_lose_the_cable_and_then_a_node_and_end_as_if_nothing_had_been(
    nodes: Nodes, train_args, tmp_path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = run([*launch("cpu_zero2", "-m", "train"), *train_args, *SETTINGS, f"out={whole}"])
    assert done.returncode == 0, done.stderr[-2000:]
    args = [*train_args, *SETTINGS, f"out={out}", f"engine.timeout_s={TIMEOUT_S}"]

    def start(attempt: str) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
        logs = [tmp_path / f"{attempt}_{node}.log" for node in range(2)]
        return [nodes.start(node, args, logs[node]) for node in range(2)], logs

    running, logs = start("cable")
    wait_for_steps(out, 3, running)
    nodes.cable("down")
    pulled = time.monotonic()
    lines = [wait_for_line(log, "stops while", 4 * TIMEOUT_S + 30) for log in logs]
    print(f"\ncable pulled; both had stopped {time.monotonic() - pulled:.1f} s later")
    print("\n".join(lines))
    assert "missing: rank 1" in lines[0] and "missing: rank 0" in lines[1]
    nodes.cable("up")
    for process in running:
        kill_node(process)

    running, logs = start("node")
    wait_for_steps(out, 3, running)
    kill_node(running[1])
    killed = time.monotonic()
    line = wait_for_line(logs[0], "stops while", 4 * TIMEOUT_S + 30)
    print(f"node 1 killed; node 0 had stopped {time.monotonic() - killed:.1f} s later")
    print(line)
    assert "missing: rank 1" in line
    kill_node(running[0])

    running, logs = start("end")
    for process, log in zip(running, logs, strict=True):
        assert process.wait(timeout=300) == 0, log.read_text(errors="replace")[-3000:]
    resumed = wait_for_line(logs[0], "resumed from", 1)
    print(resumed.rpartition("\r")[2].strip())
    require_equal_bits(out, whole)


# The doctor, on the same two nodes.


class Doctor:
    """The doctor on both nodes; `first`, a line of shell, and `env` are planted on node 1."""

    def __init__(self, nodes: Nodes, folder: Path, *settings: str, first: str = "", **env: str) -> None:
        (folder / "shared").mkdir()
        line = ["python", "-m", "launch", "doctor", "configs/machines/laptop.yaml", "machine.processes=1"]
        line += ["machine.nodes=2", "machine.host=node0", "machine.port=29517", "timeout_s=15"]
        line += [f"shared={folder / 'shared'}", *settings]
        self.logs = [folder / f"node{node}.log" for node in range(2)]
        self.running = [
            nodes.inside(0, [*line, "machine.node_rank=0"], self.logs[0], {}),
            nodes.inside(1, [*line, "machine.node_rank=1"], self.logs[1], env, first),
        ]

    def problems(self, *statuses: int) -> list[str]:
        """What node 0 has problems, once both nodes have ended with `statuses`."""
        ended = [process.wait(timeout=240) for process in self.running]
        texts = [log.read_text() for log in self.logs]
        print(f"\n{texts[0]}node 1: {texts[1]}")
        assert ended == list(statuses)
        return [line for line in texts[0].splitlines() if line.startswith("problem: ")]


def test_the_doctor_names_all_that_is_wrong_with_a_node_and_nothing_else(nodes: Nodes, tmp_path) -> None:
    """Another version, another and nearly full file system under the shared folder's path, a slow way out."""
    stub = tmp_path / "stub" / "webdataset-0.1.dist-info"
    stub.mkdir(parents=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.1\n")
    sh(f"tc -n {nodes.names[1]} qdisc add dev {nodes.names[1]} root tbf rate 80mbit burst 64kb latency 100ms")
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}/shared;"
    settings = [*LOOSE, "limits.mb_per_s=100"]
    problems = Doctor(nodes, tmp_path, *settings, first=mount, PYTHONPATH=str(stub.parent)).problems(1, 0)
    assert len(problems) == 5
    assert problems[0].startswith("problem: node 1 (node1): webdataset 0.1, but 1 of 2 nodes have ")
    assert problems[1].startswith("problem: node 1 (node1): 0.01 of the needed 1 GiB free where runs are written to")
    assert problems[2].startswith("problem: node 0 (node0): cannot read what node 1 (node1) wrote to ")
    assert problems[3].startswith("problem: node 1 (node1): cannot read what node 0 (node0) wrote to ")
    slow = re.match(r"problem: node 1 \(node1\) -> node 0 \(node0\): (\d+) MB/s, \d+ are needed", problems[4])
    assert slow and 5 <= int(slow[1]) <= 11, problems[4]  # 80 Mbit/s are 10 MB/s


def test_the_doctor_names_ports_that_are_closed(nodes: Nodes, tmp_path) -> None:
    for ports in ("1024-29516", "29518-65534"):
        sh(f"ip -n {nodes.names[1]} rule add ipproto tcp dport {ports} blackhole")
    to_1, to_0, links = Doctor(nodes, tmp_path, *LOOSE).problems(1, 0)
    assert to_1.startswith("problem: node 0 (node0): no connection to node 1 (node1) at 10.77.0.2: ")
    assert to_0.startswith("problem: node 1 (node1): no connection to node 0 (node0) at 10.77.0.1: ")
    assert links.startswith("problem: links: were not measured: not all nodes reach each other")


def test_the_doctor_does_not_wait_for_ever_for_a_node_that_is_cut_off(nodes: Nodes, tmp_path) -> None:
    nodes.cable("down")
    lost, _ = Doctor(nodes, tmp_path, *LOOSE).problems(1, 1)
    assert lost.startswith("problem: node 1: did not come in 15 s")
    assert "node0:29517 of node 0 not reached within 15 s" in (tmp_path / "node1.log").read_text()


def test_the_doctor_ends_when_the_cable_is_pulled_while_it_measures(nodes: Nodes, tmp_path) -> None:
    sh(f"tc -n {nodes.names[1]} qdisc add dev {nodes.names[1]} root tbf rate 1mbit burst 64kb latency 100ms")
    doctor = Doctor(nodes, tmp_path, *LOOSE)
    wait_for_line(doctor.logs[0], "measuring links", 60)
    ours = f"ip netns exec {nodes.names[0]} ss -Htn state established dst 10.77.0.2 and not sport = :29517"
    wait_until(lambda: subprocess.run(ours.split(), capture_output=True, text=True).stdout, 60)  # gloo's connection
    nodes.cable("down")  # the first transfer, of 250 kB at 125 kB/s, has begun
    (links,) = doctor.problems(1, 1)
    assert re.match(r"problem: links: were not measured: .*15000 ?ms", links)
    assert "problem: node 1: " in doctor.logs[1].read_text()
