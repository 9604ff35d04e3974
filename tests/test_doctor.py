"""The doctor: what it finds out is true, what it finds wrong is wrong, and it never waits forever."""

import json
import shlex
import socket
import subprocess
import threading
import time
from dataclasses import replace
from datetime import timedelta

import kubernetes_validate
import psutil
import pytest
from tiny_training import ROOT, run
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from configs import build, storage, to_dict
from configs.cli import run as run_words
from launch.__main__ import VERBS
from launch.cluster_report import ClusterReport, LimitsConfig, find_issues, report_text
from launch.doctor import NodeAddress, all_gather, doctor_job, join_nodes, printable, put, read_doctor, take
from launch.machine import MachineConfig
from launch.node import (
    Link,
    NodeFacts,
    NodeReport,
    SharedPath,
    clock_ahead,
    inspect_node,
    parse_gpus,
    peers,
    probe_connectivity,
    probe_path,
)
from launch.rendezvous import LOOPBACK, listen, own_address, serve_store
from train.watchdog import call

MACHINE = MachineConfig(nodes=2, processes=2, host="a")
GPUS, FREE = parse_gpus(2 * "NVIDIA H100 80GB HBM3, 550.54.15, 81000, 81559\n")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "worldloom": "0.1.0+0123abcd", "GPUs": GPUS}
FACTS = NodeFacts(VERSIONS, FREE, 2, 800.0, 1000.0, 100.0, 400.0)


def node(number: int, paths: tuple[SharedPath, ...] = (), unreached: tuple[str, ...] = (), **facts) -> NodeReport:
    return NodeReport(number, "ab"[number], f"10.0.0.{number + 1}", replace(FACTS, **facts), paths, unreached)


FAST = Link(0, 1, 9000.0, 0.02, 0.0)
HEALTHY = ClusterReport((node(0), node(1)), {}, (FAST, replace(FAST, source=1, target=0)))


def issues(report: ClusterReport, machine: MachineConfig = MACHINE) -> list[str]:
    return find_issues(report, machine, LimitsConfig())


def test_healthy_nodes_have_no_issue_and_the_report_shows_them() -> None:
    assert issues(HEALTHY) == []
    text = report_text(HEALTHY)
    assert "software of node 0 (a): python 3.11.7, torch" in text
    assert "node 1 (b) at 10.0.0.2: GPUs 2 x NVIDIA H100 80GB HBM3 (550.54.15); GiB free: memory 800.0, " in text
    assert "node 0 (a) -> node 1 (b): 9000 MB/s" in text


def first(**facts) -> dict:
    return {"nodes": (node(0, **facts), node(1))}


def second(**facts) -> dict:
    return {"nodes": (node(0), node(1, **facts))}


def linked(**measured) -> dict:
    return {"links": (replace(FAST, **measured), HEALTHY.links[1])}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"nodes": (node(0),), "lost": {"1": "did not come within 60 s"}}, "node 1: did not come within 60 s"),
        (second(versions={**VERSIONS, "torch": "2.12.0"}), "node 1 (b): torch 2.12.0, but 1 of 2 nodes have 2.13.0"),
        (first(versions={**VERSIONS, "torch": "missing"}), "node 0 (a): torch is not installed; pip install"),
        (
            second(versions={**VERSIONS, "worldloom": "0.1.0+ffff0000"}),
            "node 1 (b): worldloom 0.1.0+ffff0000, but 1 of 2 nodes have 0.1.0+0123abcd; check out the same commit",
        ),
        (second(versions={**VERSIONS, "GPUs": "2 x A"}), "node 1 (b): GPUs 2 x A, but 1 of 2 nodes have 2 x NVIDIA"),
        (second(visible_gpus=1), "node 1 (b): torch sees 1 GPUs, machine.processes is 2"),
        (second(gpu_free=(1.0, 0.5)), "node 1 (b): 50% of the memory of GPU 1 is in use"),
        (first(disk_gib=3.0), "node 0 (a): 3.00 of the needed 20 GiB free where runs"),
        (second(shm_gib=0.06), "node 1 (b): 0.06 of the needed 1 GiB free in /dev/shm"),
        (first(memory_gib=3.0), "node 0 (a): 3.00 of the needed 4 GiB of memory"),
        (
            {"nodes": (node(0, (SharedPath("/d"),)), node(1, (SharedPath("/d", "there is no such folder"),)))},
            "node 1 (b): cannot write to /d: there is no such folder; mount it there",
        ),
        (
            {"nodes": (node(0, (SharedPath("s3://d"),)), node(1, (SharedPath("s3://d", "", (0,)),)))},
            "node 1 (b): cannot read what node 0 (a) wrote to s3://d; give all nodes the same endpoint",
        ),
        (
            first(unreached=("node 1 (b) at 127.0.1.1: refused",)),
            "node 0 (a): no connection to node 1 (b) at 127.0.1.1: refused; open all ports",
        ),
        ({"links": (), "unmeasured": "they hid"}, "links: were not measured: they hid"),
        (linked(ahead_s=-7.5), "node 1 (b): its clock is 7.50 s behind that of node 0 (a); let chrony"),
        (linked(mb_per_s=50.0), "node 0 (a) -> node 1 (b): 50 MB/s, 2262 are needed"),
        (linked(latency_ms=31.0), "node 0 (a) -> node 1 (b): 31.00 ms, 5 are allowed"),
    ],
)
def test_each_fault_is_one_line_that_names_its_node_and_a_fix(changes: dict, line: str) -> None:
    report = replace(HEALTHY, **changes)
    assert len(issues(report)) == 1 and issues(report)[0].startswith(line), issues(report)
    assert report_text(report)


def test_gpus_do_not_matter_where_they_are_not_used() -> None:
    assert not issues(replace(HEALTHY, **second(versions={**VERSIONS, "GPUs": "none"})), replace(MACHINE, device="cpu"))


def test_a_skew_within_the_round_trip_is_none() -> None:
    unsure = replace(HEALTHY, **linked(ahead_s=2.0, latency_ms=2e3))
    assert find_issues(unsure, MACHINE, LimitsConfig(latency_ms=1e4)) == []


def test_of_many_bad_links_the_worst_are_named_and_the_rest_counted() -> None:
    machine = MachineConfig(nodes=20, processes=1, host="a", device="cpu")
    nodes = tuple(replace(node(0), node=i, host=f"h{i}") for i in range(20))
    found = issues(ClusterReport(nodes, {}, tuple(Link(0, i, float(i), 0.1, 0.0) for i in range(1, 20))), machine)
    assert len(found) == 11 and "node 1 (h1): 1 MB/s" in found[0] and "9 more" in found[-1]


@pytest.mark.parametrize("ahead_s", [-3.5, 0.0, 0.25])
def test_a_clock_is_read_right_through_any_delay(ahead_s: float) -> None:
    pings = []
    for there_s, back_s in ((0.2, 0.3), (0.001, 0.001), (0.5, 0.0)):  # delays of the two ways
        pings.append((100.0, 100.0 + there_s + ahead_s, 100.0 + there_s + back_s))
    found, round_trip_s = clock_ahead(pings)
    assert abs(found - ahead_s) <= round_trip_s / 2 and round_trip_s == pytest.approx(0.002)


@pytest.mark.parametrize("n", range(1, 10))
def test_every_pair_of_nodes_meets_once_and_no_node_meets_two_at_a_time(n: int) -> None:
    met = [(own, peer) for own in range(n) for peer in peers(own, n) if peer is not None]
    assert sorted(met) == [(a, b) for a in range(n) for b in range(n) if a != b]
    rounds = [list(row) for row in zip(*(peers(own, n) for own in range(n)), strict=True)]
    assert all(row[row[own]] == own for row in rounds for own in range(n) if row[own] is not None)


def test_facts_and_reports_survive_json() -> None:
    facts = inspect_node("nowhere/yet")
    assert facts.memory_gib > 0 and facts.disk_gib > 0
    assert facts.versions["torch"] and "missing" not in facts.versions.values()
    report = replace(HEALTHY, nodes=(replace(node(0, (SharedPath("/data", "", (1,)),)), facts=facts),))
    assert build(ClusterReport, json.loads(json.dumps(to_dict(report)))) == report


def test_lines_of_nvidia_smi_that_are_no_gpu_are_skipped() -> None:
    assert GPUS == "2 x NVIDIA H100 80GB HBM3 (550.54.15)" and pytest.approx((0.993, 0.993), abs=1e-3) == FREE
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n\n") == ("none", ())


def test_a_call_that_hangs_or_fails_says_what_it_was() -> None:
    def fail() -> None:
        raise TimeoutError("disk full\nand more")

    with pytest.raises(ConnectionError, match=r"^sleeping did not end within 0\.1 s$"):
        call("sleeping", 0.1, time.sleep, 5)
    with pytest.raises(ConnectionError, match=r"^writing failed: disk full and more$"):
        call("writing", 5, fail)
    assert call("adding", 5, int, "3") == 3


@pytest.fixture
def stores():
    """Two nodes that meet in one process."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    return store, TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=10))


ADDRESS = NodeAddress("a", "10.0.0.1", 1)
SECOND = replace(MACHINE, node_rank=1)


def test_nodes_hear_each_other_and_those_that_say_nothing_are_left_out(stores) -> None:
    found = {}
    second = threading.Thread(target=lambda: found.update({1: all_gather(stores[1], SECOND, "address", ADDRESS, 5)}))
    second.start()
    found[0] = all_gather(stores[0], MACHINE, "address", ADDRESS, 5)
    second.join()
    assert found == {0: {0: ADDRESS, 1: ADDRESS}, 1: {0: ADDRESS, 1: ADDRESS}}
    assert all_gather(stores[0], MACHINE, "again", ADDRESS, 0.1) == {0: ADDRESS}
    with pytest.raises(ConnectionError, match="timeout_s"):
        all_gather(stores[1], SECOND, "again", ADDRESS, 0.1)  # too late
    with pytest.raises(ConnectionError, match="node 0 has not answered"):
        all_gather(stores[1], SECOND, "more", ADDRESS, 0.1)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{}", '{"host": "a"}', '{"host": "a", "port": 1e999}', '{"a": ' * 100_000, b"\xff"],
    ids=["empty", "a list", "a number", "no keys", "a key less", "infinite", "deep", "no text"],
)  # fmt: skip
def test_what_another_node_says_wrong_is_one_line(stores, text) -> None:
    stores[1].set("address/1", text)
    with pytest.raises(ConnectionError, match=r"^what another node says as 'address/1'") as raised:
        take(stores[0], "address/1", NodeAddress)
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_another_node_cannot_steer_the_terminal() -> None:
    assert printable("node 1 (\x1b]0;x\x07)\n") == "node 1 (?]0;x?)\n"


def test_on_one_machine_ports_are_closed_to_others() -> None:
    doctors, runs = join_nodes(MachineConfig(port=0), 5), serve_store("node0", 0, 1, timedelta(seconds=5))
    torchs = StaticTCPRendezvous(LOOPBACK, runs.port, 0, 1, "a run", 5)  # as the launcher then meets, in this process
    torchs.next_rendezvous().store.set("key", "value")
    assert runs.get("a run/key") == b"value"
    listening = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    ports = {doctors.port, runs.port}
    assert {one.port for one in listening} >= ports
    assert {one.ip for one in listening if one.port in ports} == {LOOPBACK}


def test_the_first_of_several_nodes_listens_where_the_others_find_it() -> None:
    assert own_address("localhost") == own_address("127.0.0.1") == own_address("192.0.2.1") == ""
    mine = {one.address for all_of in psutil.net_if_addrs().values() for one in all_of if one.family == socket.AF_INET}
    for address in mine - {LOOPBACK}:
        assert own_address(address) == address
    everywhere = listen("", 0)  # where its own name means loopback, as in Debian's /etc/hosts
    socket.create_connection((next(iter(mine - {LOOPBACK}), LOOPBACK), everywhere.getsockname()[1])).close()
    everywhere.close()


def test_the_first_node_s_port_is_free_again_after_the_doctor() -> None:
    port = TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port
    for _ in range(2):
        machine = replace(MACHINE, host="127.0.0.2", port=port)
        first = join_nodes(machine, 5)
        second = join_nodes(replace(machine, node_rank=1), 5)
        put(second, "address", ADDRESS)
        assert take(first, "address", NodeAddress) == ADDRESS
        del first, second


@pytest.mark.parametrize("folder", ["tmp_path", "bucket_folder"])
def test_a_path_is_shared_if_all_read_what_each_has_written(folder: str, request) -> None:
    url, found = str(request.getfixturevalue(folder)), {}
    visits = [threading.Thread(target=lambda i=i: found.update({i: probe_path(url, "t", i, (0, 1))})) for i in (0, 1)]
    for visit in visits:
        visit.start()
    for visit in visits:
        visit.join()
    assert found == {0: SharedPath(url), 1: SharedPath(url)}
    assert sorted(storage.list_tree(url)) == [".doctor_t_0", ".doctor_t_1"]


def test_a_path_that_others_write_elsewhere_or_that_is_not_there_is_found(tmp_path) -> None:
    assert probe_path(str(tmp_path), "t", 0, (0, 1)) == SharedPath(str(tmp_path), "", (1,))
    gone = str(tmp_path / "gone")
    assert probe_path(gone, "t", 0, (0,)) == SharedPath(gone, "there is no such folder", (0,))


def test_a_node_that_does_not_listen_is_not_reached() -> None:
    with listen(LOOPBACK, 0) as listener, listen(LOOPBACK, 0) as closed:
        ports = {"node 1": listener.getsockname()[1], "node 2": closed.getsockname()[1]}
        closed.close()
        (unreached,) = probe_connectivity({node: (LOOPBACK, port) for node, port in ports.items()})
    assert unreached.startswith("node 2: ") and "refused" in unreached


LOOSE = [f"limits.{name}=0" for name in ("disk_gib", "temp_gib", "shm_gib", "memory_gib", "mb_per_s", "slow_share")]


def test_this_machine_is_examined(bucket_folder, tmp_path) -> None:
    given = [f"shared={tmp_path}", f"bucket={bucket_folder}", "machine.port=0", f"report={tmp_path / 'report.json'}"]
    done = run(["python", "-m", "launch", "doctor", "configs/machines/laptop.yaml", *given, *LOOSE])
    assert done.returncode == 0 and "no problem found" in done.stdout, done.stdout + done.stderr
    report = build(ClusterReport, json.loads((tmp_path / "report.json").read_text()))
    assert report.nodes[0].paths == (SharedPath(str(tmp_path)), SharedPath(bucket_folder))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_two_nodes_measure_their_links(tmp_path, monkeypatch) -> None:
    """Both on this machine, where each finds the other by its name."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    port = TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port
    script = tmp_path / "measures.py"
    script.write_text(
        "import sys\nfrom launch.doctor import *\n"
        f"cluster = Cluster(nodes=2, node_rank=int(sys.argv[1]), host='127.0.0.1', port={port})\n"
        "store = join_nodes(cluster, 30)\n"
        "both = all_gather(store, cluster, 'links', measure(store, cluster.node_rank, 2, 1.0, 30.0), 30)\n"
        "links = [link for one in both.values() for link in one.links]\n"
        "assert [(link.source, link.target) for link in links] == [(0, 1), (1, 0)]\n"
        "assert all(link.mb_per_s > 0 and abs(link.ahead_s) <= link.latency_ms / 1e3 for link in links), links\n"
        "all_gather(store, cluster, 'left', both[0], 30)\n"
    )
    line = ["python", str(script)]
    second = threading.Thread(target=run, args=([*line, "1"],), kwargs={"PYTHONPATH": str(ROOT)})
    second.start()
    done = run([*line, "0"], PYTHONPATH=str(ROOT))
    second.join()
    assert done.returncode == 0, done.stderr


def start(*args: str) -> int:
    return run_words("launch", VERBS, ["doctor", *args])


def test_a_port_that_is_taken_is_a_problem_of_one_line(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with listen(LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        assert start("configs/machines/laptop.yaml", f"machine.port={port}") == 1
    said = capsys.readouterr().out
    assert said.startswith(f"problem: node 0: port {port} cannot be listened on")
    assert said.count("\n") == 1


def test_a_scheduler_s_nodes_run_the_doctor_told_which_of_them_they_are(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    args = ["configs/machines/slurm.yaml", "shared=/data", "script=job.sh", "dry_run=true"]
    config = read_doctor(args)
    text = config.machine.render(doctor_job(config, args))
    (tmp_path / "job.sh").write_text(text)
    for check in (["bash", "-n"], ["shellcheck", "--severity=warning"]):
        assert subprocess.run([*check, str(tmp_path / "job.sh")], capture_output=True).returncode == 0
    assert "#SBATCH --job-name=worldloom-doctor" in text and "#SBATCH --no-requeue" in text
    assert "#SBATCH --time=6" in text and "USR1@" not in text and "scontrol requeue" not in text
    step = shlex.split(next(line for line in text.splitlines() if line.startswith("srun ")))
    assert step[1] == "--kill-on-bad-exit=0"
    shown = ["bash", "-c", step[-1].replace("exec python -m launch doctor", "printf '%s\\n'")]
    at = {"SLURM_NODEID": "3", "HEAD": "node17"}
    given = subprocess.run(shown, capture_output=True, text=True, check=True, env=at).stdout.splitlines()
    machine = read_doctor(given).machine
    assert (machine.kind, machine.node_rank, machine.host, machine.nodes) == ("local", 3, "node17", 4)


def test_the_doctor_s_job_for_kubernetes_is_valid_and_runs_once(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    args = ["configs/machines/kubernetes.yaml", "bucket=s3://data"]
    config = read_doctor(args)
    service, job = config.machine.kubernetes.manifests(config.machine, doctor_job(config, args))
    for one in (service, job):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] == 0
    assert "lifecycle" not in pod["containers"][0] and pod["subdomain"] == service["metadata"]["name"]
    line = shlex.split(pod["containers"][0]["command"][-1].replace('"$JOB_COMPLETION_INDEX"', "1"))
    machine = read_doctor(line[line.index("doctor") + 1 :]).machine
    assert (machine.node_rank, machine.host) == (1, "worldloom-doctor-0.worldloom-doctor")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["configs/machines/laptop.yaml", "shred=/data"], "did you mean 'shared'"),
        (["configs/machines/laptop.yaml", "bucket=/data"], "bucket=/data"),
        (["configs/machines/laptop.yaml", "timeout_s=1"], "timeout_s=1"),
        (["configs/machines/laptop.yaml", "limits.slow_share=2"], "limits.slow_share"),
        (["configs/machines/laptop.yaml", "script=job.sh"], "script=job.sh"),
        (["shared=/data"], "configs/machines"),
    ],
)
def test_a_wrong_setting_is_one_line(given: list[str], line: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert start(*given) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
