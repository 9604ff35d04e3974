"""The doctor: what it finds out is true, what it finds wrong is wrong, and it never waits forever."""

import json
import shlex
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial

import psutil
import pytest
import torch
from rendered import require_valid_manifests, require_valid_script, step_of
from tiny_training import ROOT, run
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from configs import build, storage, to_dict
from configs.cli import run as run_args
from configs.errors import UserError
from launch import node
from launch.__main__ import VERBS
from launch.cluster_report import ClusterReport, LimitsConfig, find_issues, report_text
from launch.doctor import NodeAddress, all_gather, connection_error, doctor_job, join_nodes, read_doctor, show
from launch.machine import MachineConfig
from launch.node import Links, NodeReport, SharedPath, clocks_ahead, gpus, probe_path, rounds, software
from launch.rendezvous import LOOPBACK, listen, own_address, serve_store
from train.watchdog import call

MACHINES = ROOT / "configs/machines"
LAPTOP = f"{MACHINES}/laptop.yaml"
MACHINE = MachineConfig(nodes=2, processes=2, host="a")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "worldloom": "0123abcd", "GPUs": "2 x H100 (driver 550.54.15)"}
NODE = NodeReport(0, "a", "10.0.0.1", VERSIONS, (1.0, 1.0), 1000.0, 400.0)
SECOND = replace(NODE, node=1, host="b", address="10.0.0.2")
LINKS = Links(((0.0, 9000.0), (8000.0, 0.0)), (0.0, 0.0))
WRITTEN, UNREAD = SharedPath("s3://d"), SharedPath("s3://d", "", (0,))
HEALTHY = ClusterReport((NODE, SECOND), {}, LINKS)


def issues(report: ClusterReport, machine: MachineConfig = MACHINE) -> list[str]:
    return find_issues(report, machine, LimitsConfig())


def test_healthy_nodes_have_no_issue_and_the_report_shows_them() -> None:
    assert issues(HEALTHY) == []
    text = report_text(HEALTHY)
    assert "software of node 0 (a): python 3.11.7, torch" in text
    assert "node 1 (b) at 10.0.0.2: GPUs 2 x H100 (driver 550.54.15); GiB free: disk 1000.0, " in text
    assert "node 0 (a) -> node 1 (b): 9000 MB/s" in text


def second(**facts) -> dict:
    return {"nodes": (NODE, replace(SECOND, **facts))}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"nodes": (NODE,), "lost": {"1": "did not come in 60 s"}, "links": Links()}, "node 1: did not come in 60 s"),
        (second(versions={**VERSIONS, "torch": "2.12.0"}), "node 1 (b): torch 2.12.0, but 1 of 2 nodes have 2.13.0"),
        (second(versions={**VERSIONS, "torch": "missing"}), "node 1 (b): torch missing, but 1 of 2 nodes have 2.13.0"),
        (second(versions={**VERSIONS, "worldloom": "f"}), "node 1 (b): worldloom f, but 1 of 2 nodes have 0123abcd; "),
        (second(versions={**VERSIONS, "GPUs": "2 x A"}), "node 1 (b): GPUs 2 x A, but 1 of 2 nodes have 2 x H100"),
        (second(gpu_free=(1.0,)), "node 1 (b): torch sees 1 GPUs, machine.processes is 2"),
        (second(gpu_free=(1.0, 0.5)), "node 1 (b): 50% of the memory of GPU 1 is in use"),
        (second(disk_gib=3.0), "node 1 (b): 3.00 of the needed 20 GiB free where runs"),
        (second(shm_gib=0.06), "node 1 (b): 0.06 of the needed 1 GiB free in /dev/shm"),
        (second(paths=(SharedPath("/d", "not there"),)), "node 1 (b): cannot write to /d: not there; mount it there"),
        (
            {"nodes": (replace(NODE, paths=(WRITTEN,)), replace(SECOND, paths=(UNREAD,)))},
            "node 1 (b): cannot read what node 0 (a) wrote to s3://d; give all nodes the same endpoint",
        ),
        (
            second(unreached=("node 0 (a) at 127.0.1.1: refused",)),
            "node 1 (b): no connection to node 0 (a) at 127.0.1.1",
        ),
        ({"links": Links(), "unmeasured": "they hid"}, "links: were not measured: they hid"),
        ({"links": replace(LINKS, ahead_s=(0.0, -7.5))}, "node 1 (b): its clock is 7.50 s behind that of node 0 (a)"),
        (
            {"links": replace(LINKS, mb_per_s=((0.0, 50.0), (8000.0, 0.0)))},
            "node 0 (a) -> node 1 (b): 50 MB/s, 2012 are needed",
        ),
    ],
)
def test_each_fault_is_one_line_that_names_its_node_and_a_fix(changes: dict, line: str) -> None:
    report = replace(HEALTHY, **changes)
    assert len(issues(report)) == 1 and issues(report)[0].startswith(line), issues(report)
    assert report_text(report)


def test_gpus_do_not_matter_where_they_are_not_used() -> None:
    assert not issues(replace(HEALTHY, **second(versions={**VERSIONS, "GPUs": "none"})), replace(MACHINE, device="cpu"))


def test_of_many_slow_links_the_worst_are_named_and_the_rest_counted() -> None:
    machine = MachineConfig(nodes=20, processes=1, host="a", device="cpu")
    nodes = tuple(replace(NODE, node=i, host=f"h{i}") for i in range(20))
    rates = torch.full((20, 20), 200.0)
    rates[0, 1:] = torch.arange(1, 20)
    lines = issues(ClusterReport(nodes, {}, Links(tuple(map(tuple, rates.tolist())))), machine)
    assert len(lines) == 11 and "node 1 (h1): 1 MB/s" in lines[0] and "9 more" in lines[-1]


def test_a_clock_is_read_right_though_some_readings_come_late() -> None:
    readings = torch.tensor([[10.0, 13.5, 9.0], [20.0, 23.7, 19.9], [30.4, 33.4, 30.4]], dtype=torch.float64)
    assert clocks_ahead(readings) == pytest.approx((0.0, 3.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("n", range(1, 10))
def test_every_pair_of_nodes_meets_once_and_no_node_meets_two_at_a_time(n: int) -> None:
    met = [(own, peer) for own in range(n) for peer in rounds(own, n) if peer is not None]
    assert sorted(met) == [(a, b) for a in range(n) for b in range(n) if a != b]
    rows = [list(row) for row in zip(*(rounds(own, n) for own in range(n)), strict=True)]
    assert all(row[row[own]] == own for row in rows for own in range(n) if row[own] is not None)


def test_facts_are_read_and_reports_survive_json() -> None:
    assert all(software()[name] for name in ("python", "torch", "deepspeed", "worldloom"))
    assert torch.cuda.is_available() or gpus()[0].startswith("none")
    report = replace(HEALTHY, **second(paths=(SharedPath("/data", "", (1,)),)))
    assert build(ClusterReport, json.loads(json.dumps(to_dict(report)))) == report


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
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=2))
    return store, TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=2))


ADDRESS = NodeAddress("a", "10.0.0.1", 1)


def test_nodes_hear_each_other_and_those_that_say_nothing_are_left_out(stores) -> None:
    heard = {}
    second = threading.Thread(target=lambda: heard.update({1: all_gather(stores[1], 1, (0, 1), "address", ADDRESS, 5)}))
    second.start()
    heard[0] = all_gather(stores[0], 0, (0, 1), "address", ADDRESS, 5)
    second.join()
    assert heard == {0: {0: ADDRESS, 1: ADDRESS}, 1: {0: ADDRESS, 1: ADDRESS}}
    assert all_gather(stores[0], 0, (0, 1), "again", ADDRESS, 0.1) == {0: ADDRESS}
    with pytest.raises(ConnectionError, match="timeout_s"):
        all_gather(stores[1], 1, (0, 1), "again", ADDRESS, 0.1)  # too late
    with pytest.raises(RuntimeError, match="timeout"):
        all_gather(stores[1], 1, (0, 1), "more", ADDRESS, 0.1)  # node 0 does not answer


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{}", '{"host": "a"}', '{"host": "a", "port": 1e999}', '{"a": ' * 100_000, b"\xff"],
    ids=["empty", "a list", "a number", "no keys", "a key less", "infinite", "deep", "no text"],
)  # fmt: skip
def test_a_damaged_message_of_another_node_is_one_line(stores, text) -> None:
    stores[1].set("address/1", text)
    with pytest.raises(UserError, match=r"^node 1") as raised:
        all_gather(stores[0], 0, (0, 1), "address", ADDRESS, 0.1)
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_another_node_cannot_steer_the_terminal(capsys) -> None:
    show("node 1 (\x1b]0;x\x07)\nnode 2")
    assert capsys.readouterr().out == "node 1 (?]0;x?)\nnode 2\n"


def test_on_one_machine_ports_are_closed_to_others() -> None:
    doctors, runs = join_nodes(MachineConfig(port=0), 5), serve_store("node0", 0, 1, timedelta(seconds=5))
    torchs = StaticTCPRendezvous(LOOPBACK, runs.port, 0, 1, "a run", 5)  # as the launcher then meets, in this process
    torchs.next_rendezvous().store.set("key", "value")
    assert runs.get("a run/key") == b"value"
    connections = psutil.Process().net_connections("tcp")
    addresses = {c.laddr.port: c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert addresses[doctors.port] == addresses[runs.port] == LOOPBACK


def test_the_first_of_several_nodes_listens_where_the_others_find_it() -> None:
    assert own_address("localhost") == own_address("127.0.0.1") == own_address("192.0.2.1") == ""
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    addresses = {entry.address for entry in entries if entry.family == socket.AF_INET} - {LOOPBACK}
    assert all(own_address(address) == address for address in addresses)
    with listen("", 0) as everywhere:  # where its own name means loopback, as in Debian's /etc/hosts
        socket.create_connection((next(iter(addresses), LOOPBACK), everywhere.getsockname()[1])).close()


def test_a_path_that_others_write_elsewhere_or_that_is_not_there_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(node, "SYNC_S", 0.5)
    assert probe_path(str(tmp_path), "t", 0, (0, 1)) == SharedPath(str(tmp_path), "", (1,))
    gone = str(tmp_path / "gone")
    assert probe_path(gone, "t", 0, (0,)) == SharedPath(gone, "there is no such folder", (0,))


def test_a_node_that_does_not_listen_is_not_reached() -> None:
    with listen(LOOPBACK, 0) as listener:
        address = replace(ADDRESS, address=LOOPBACK, port=listener.getsockname()[1])
        assert connection_error(address) == ""
    assert "refused" in connection_error(address)


LOOSE = [f"limits.{name}=0" for name in ("disk_gib", "shm_gib", "mb_per_s", "slow_share")]


@pytest.fixture(scope="module")
def port() -> int:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_doctor_examines_this_machine_and_two_nodes_on_it(bucket_folder, tmp_path, port, nodes: int) -> None:
    """This machine is 127.0.0.2 too. One doctor's port is free again for the next."""
    settings = [f"machine.nodes={nodes}", "machine.host=127.0.0.2", f"machine.port={port}", "megabytes=1"]
    settings += [f"shared={tmp_path}", f"bucket={bucket_folder}", f"report={tmp_path}/report.json", *LOOSE]
    line = ["python", "-m", "launch", "doctor", LAPTOP, *settings]
    with ThreadPoolExecutor() as pool:
        lines = [[*line, f"machine.node_rank={i}"] for i in range(nodes)]
        for done in pool.map(partial(run, GLOO_SOCKET_IFNAME="lo"), lines):
            assert done.returncode == 0, done.stdout + done.stderr
    report = build(ClusterReport, json.loads((tmp_path / "report.json").read_text()))
    assert all(node.paths == (SharedPath(str(tmp_path)), SharedPath(bucket_folder)) for node in report.nodes)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"] and not storage.list_tree(bucket_folder)
    links = report.links
    assert nodes == 1 or (links.mb_per_s[0][1] > 0 < links.mb_per_s[1][0] and abs(links.ahead_s[1]) < 0.5)


def start(*args: str) -> int:
    return run_args("launch", VERBS, ["doctor", *args])


def test_a_port_that_is_taken_is_a_problem_of_one_line(capsys) -> None:
    with listen(LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        assert start(LAPTOP, f"machine.port={port}") == 1
    output = capsys.readouterr().out
    assert output.startswith(f"problem: node 0: port {port} cannot be listened on") and output.count("\n") == 1


def test_the_nodes_of_a_scheduler_run_the_doctor_and_know_which_of_them_they_are(tmp_path) -> None:
    args = [f"{MACHINES}/slurm.yaml", "shared=/data", "script=job.sh", "dry_run=true"]
    config = read_doctor(args)
    text = config.machine.render(doctor_job(config, args))
    require_valid_script(text, tmp_path / "job.sh")
    assert "#SBATCH --job-name=worldloom-doctor" in text and "#SBATCH --no-requeue" in text
    assert "#SBATCH --time=6" in text and "USR1@" not in text and "scontrol requeue" not in text
    options, line = step_of(text)
    assert options[1] == "--kill-on-bad-exit=0" and line[0] == "doctor"
    machine = read_doctor(line[1:]).machine
    assert (machine.kind, machine.node_rank, machine.host, machine.nodes) == ("local", 3, "node17", 4)


def test_the_doctor_s_job_for_kubernetes_is_valid_and_runs_once() -> None:
    args = [f"{MACHINES}/kubernetes.yaml", "bucket=s3://data"]
    config = read_doctor(args)
    service, job = config.machine.kubernetes.manifests(config.machine, doctor_job(config, args))
    pod = require_valid_manifests(service, job)
    assert pod["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] == 0
    assert "lifecycle" not in pod["containers"][0] and pod["subdomain"] == service["metadata"]["name"]
    line = shlex.split(pod["containers"][0]["command"][-1].replace('"$JOB_COMPLETION_INDEX"', "1"))
    machine = read_doctor(line[line.index("doctor") + 1 :]).machine
    assert (machine.node_rank, machine.host) == (1, "worldloom-doctor-0.worldloom-doctor")


@pytest.mark.parametrize(
    ("args", "setting"),
    [
        ([LAPTOP, "shred=/data"], "did you mean 'shared'"),
        ([LAPTOP, "timeout_s=1"], "timeout_s=1"),
        ([LAPTOP, "limits.slow_share=2"], "limits.slow_share"),
        ([LAPTOP, "script=job.sh"], "script=job.sh"),
        (["shared=/data"], "'machine' is required"),
    ],
)
def test_a_wrong_setting_is_one_line(args: list[str], setting: str, capsys) -> None:
    assert start(*args) == 2
    error = capsys.readouterr().err
    assert setting in error and len(error.splitlines()) == 1
