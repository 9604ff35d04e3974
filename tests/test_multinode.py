"""Two nodes, one process in each, lose the cable between them, a node, or what the doctor should find."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from tiny_training import launch, require_equal_bits, run
from two_nodes import LOOSE, SETTINGS, Nodes, kill_node, sh, wait_for_steps

pytest_plugins = ["two_nodes"]  # the fixture `nodes`
TIMEOUT_S = 8

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"),
]


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
    require_equal_bits(out, whole)


# The doctor, on the same two nodes.


def start_doctor(
    nodes: Nodes, folder: Path, *words: str, first: str = "", env: dict[str, str] | None = None
) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
    """The doctor on both nodes and what they say; `first` and `env` are planted on node 1."""
    line = ["python", "-m", "launch", "doctor", "configs/machines/laptop.yaml", "machine.processes=1"]
    line += ["machine.nodes=2", "machine.host=node0", "machine.port=29517", "timeout_s=15"]
    line += [f"shared={folder / 'shared'}", *words]
    (folder / "shared").mkdir()
    logs = [folder / f"node{node}.log" for node in range(2)]
    running = [
        nodes.inside(0, [*line, "machine.node_rank=0"], logs[0], {}),
        nodes.inside(1, [*line, "machine.node_rank=1"], logs[1], env or {}, first),
    ]
    return running, logs


def end_of(running: list[subprocess.Popen[bytes]], logs: list[Path]) -> tuple[tuple[int, int], str]:
    """Exit statuses of both nodes and what node 0 has said."""
    status = (running[0].wait(timeout=240), running[1].wait(timeout=240))
    print("\n" + logs[0].read_text() + "node 1 says: " + logs[1].read_text())
    return status, logs[0].read_text()


def problems(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("problem: ")]


def test_the_doctor_finds_nothing_where_nothing_is_wrong(nodes: Nodes, tmp_path) -> None:
    words = [f"report={tmp_path / 'report.json'}", *LOOSE]
    status, said = end_of(*start_doctor(nodes, tmp_path, *words))
    assert status == (0, 0) and problems(said) == [] and "no problem found" in said, said
    report = json.loads((tmp_path / "report.json").read_text())
    (_, rate), (back, _) = report["links"]["mb_per_s"]
    assert rate > 0 and back > 0 and abs(report["links"]["ahead_s"][1]) < 0.1  # both read the very same clock
    assert [node["address"] for node in report["nodes"]] == ["10.77.0.1", "10.77.0.2"]
    assert list((tmp_path / "shared").iterdir()) == []  # what was written to try it is gone


def test_the_doctor_names_all_that_is_wrong_with_a_node(nodes: Nodes, tmp_path) -> None:
    """Another version, another and nearly full file system under the shared folder's path, a slow way out."""
    stub = tmp_path / "stub" / "webdataset-0.1.dist-info"
    stub.mkdir(parents=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.1\n")
    sh(f"tc -n {nodes.names[1]} qdisc add dev {nodes.names[1]} root tbf rate 80mbit burst 64kb latency 100ms")
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}/shared;"
    planted = start_doctor(
        nodes, tmp_path, *LOOSE, "limits.mb_per_s=100", first=mount, env={"PYTHONPATH": str(stub.parent)}
    )
    status, said = end_of(*planted)
    found = problems(said)
    assert status == (1, 0) and len(found) == 5, said
    assert found[0].startswith("problem: node 1 (node1): webdataset 0.1, but 1 of 2 nodes have ")
    assert found[1].startswith("problem: node 1 (node1): 0.01 of the needed 1 GiB free where runs are written to")
    assert found[2].startswith("problem: node 0 (node0): cannot read what node 1 (node1) wrote to ")
    assert found[3].startswith("problem: node 1 (node1): cannot read what node 0 (node0) wrote to ")
    slow = re.match(r"problem: node 1 \(node1\) -> node 0 \(node0\): (\d+) MB/s, \d+ are needed", found[4])
    assert slow and 5 <= int(slow[1]) <= 11, found[4]  # 80 Mbit/s are 10 MB/s


def test_the_doctor_names_ports_that_are_closed(nodes: Nodes, tmp_path) -> None:
    for ports in ("1024-29516", "29518-65534"):
        sh(f"ip -n {nodes.names[1]} rule add ipproto tcp dport {ports} blackhole")
    status, said = end_of(*start_doctor(nodes, tmp_path))
    assert status == (1, 0)
    assert "problem: node 0 (node0): no connection to node 1 (node1) at 10.77.0.2: " in said
    assert "problem: node 1 (node1): no connection to node 0 (node0) at 10.77.0.1: " in said
    assert "links: were not measured: not all nodes reach each other" in said


def test_the_doctor_does_not_wait_for_ever_for_a_node_that_is_cut_off(nodes: Nodes, tmp_path) -> None:
    nodes.cable("down")
    status, said = end_of(*start_doctor(nodes, tmp_path))
    assert status == (1, 1)
    assert "problem: node 1: did not come in 15 s" in said
    assert "node0:29517 of node 0 not reached within 15 s" in (tmp_path / "node1.log").read_text()


def test_the_doctor_ends_when_the_cable_is_pulled_while_it_measures(nodes: Nodes, tmp_path) -> None:
    sh(f"tc -n {nodes.names[1]} qdisc add dev {nodes.names[1]} root tbf rate 1mbit burst 64kb latency 100ms")
    running, logs = start_doctor(nodes, tmp_path)
    wait_for_line(logs[0], "measuring links", 60)
    ours = f"ip netns exec {nodes.names[0]} ss -Htn state established dst 10.77.0.2 and not sport = :29517"
    deadline = time.monotonic() + 60
    while not subprocess.run(ours.split(), capture_output=True, text=True).stdout:  # gloo's connection
        assert time.monotonic() < deadline
        time.sleep(0.1)
    nodes.cable("down")  # the first transfer, of 250 kB at 125 kB/s, has begun
    status, said = end_of(running, logs)
    assert status == (1, 1)
    assert re.search(r"problem: links: were not measured: .*15000 ?ms", said)
    assert "problem: node 1: " in logs[1].read_text()
