"""The doctor: what it finds out is true, what it finds wrong is wrong, and it never waits for ever."""

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
from launch.diagnosis import Examination, LimitsConfig, NodeReport, find_problems, obstacle
from launch.doctor import doctor_job, read_doctor
from launch.links import Clock, Link, RankReport, clock_ahead, rounds
from launch.machine import MachineConfig
from launch.meeting import Answer, Meeting, meet
from launch.mesh import Door, Hello, door_name, knock
from launch.node import NodeFacts, inspect_node, parse_gpus
from launch.places import Place, Trial
from launch.rendezvous import LOOPBACK, listen, own_address, serve_store
from launch.tables import examination_text, printable
from launch.timed import Doing, within

MACHINE = MachineConfig(nodes=2, processes=2, host="a")
GPUS = parse_gpus(2 * "NVIDIA H100 80GB HBM3, 81559, 81000, 550.54.15\n")
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "worldloom": "0.1.0+0123abcd"}
FACTS = NodeFacts(VERSIONS, GPUS, 2, 64, 900.0, 800.0, 1000.0, 100.0, 400.0)


def node(number: int, places: tuple[Place, ...] = (), **facts) -> NodeReport:
    return NodeReport(number, "ab"[number], f"10.0.0.{number + 1}", replace(FACTS, **facts), places, {})


def rank(number: int, **found) -> RankReport:
    return RankReport(number, number // 2, "nccl", **found)


LINKS = {0: ((0, 1), (0, 2)), 1: ((1, 3),), 2: ((2, 3),), 3: ()}
RANKS = tuple(rank(i, links=tuple(Link(pair, 9000.0, 9000.0, 0.02) for pair in LINKS[i])) for i in range(4))
HEALTHY = Examination((node(0), node(1)), {}, RANKS, "")


def said(found: Examination, machine: MachineConfig = MACHINE) -> list[str]:
    return [str(problem) for problem in find_problems(found, machine, LimitsConfig())]


def test_healthy_nodes_have_no_problem_and_the_table_shows_them() -> None:
    assert said(HEALTHY) == []
    text = examination_text(HEALTHY, MACHINE)
    assert "2 x NVIDIA H100 80GB HBM3 (550.54.15)" in text and "software of node 0, 1: python 3.11.7" in text
    assert "2 links between nodes over nccl" in text and "2 links within nodes over nccl" in text


def with_link(link: Link) -> Examination:
    return replace(HEALTHY, ranks=(replace(RANKS[0], links=(RANKS[0].links[0], link)), *RANKS[1:]))


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            replace(HEALTHY, nodes=(node(0),), lost={"1": "did not come within 60 s"}),
            "node 1: did not come within 60 s",
        ),
        (
            replace(HEALTHY, nodes=(node(0), node(1, versions={**VERSIONS, "torch": "2.12.0"}))),
            "node 1 (b): torch 2.12.0, but 1 of 2 nodes have 2.13.0; install the same version",
        ),
        (
            replace(HEALTHY, nodes=(node(0, versions={**VERSIONS, "torch": "missing"}), node(1))),
            "node 0 (a): torch is not installed; pip install",
        ),
        (
            replace(HEALTHY, nodes=(node(0), node(1, versions={**VERSIONS, "worldloom": "0.1.0+ffff0000"}))),
            "node 1 (b): worldloom 0.1.0+ffff0000, but 1 of 2 nodes have 0.1.0+0123abcd; check out the same commit",
        ),
        (
            replace(HEALTHY, nodes=(node(0), node(1, seen_gpus=1))),
            "node 1 (b): torch sees 1 GPUs, machine.processes is 2",
        ),
        (
            replace(HEALTHY, nodes=(node(0), node(1, gpus=(GPUS[0], replace(GPUS[1], free_gib=40.0))))),
            "node 1 (b): 39.6 of 79.6 GiB of GPU 1 are held; end what holds them",
        ),
        (
            replace(HEALTHY, nodes=(node(0), node(1, gpus=tuple(replace(gpu, driver="535.1") for gpu in GPUS)))),
            "node 1 (b): its GPUs are 2 x NVIDIA H100 80GB HBM3, driver 535.1, those of most nodes 2 x NVIDIA H100",
        ),
        (
            replace(HEALTHY, nodes=(node(0, disk_gib=3.0), node(1))),
            "node 0 (a): 3.00 GiB free where runs are written to",
        ),
        (
            replace(HEALTHY, nodes=(node(0), node(1, shm_gib=0.06))),
            "node 1 (b): 0.06 GiB free in /dev/shm, 1 are wanted",
        ),
        (
            replace(HEALTHY, nodes=(node(0, available_gib=3.0), node(1))),
            "node 0 (a): 3.00 GiB of memory available for 2",
        ),
        (
            replace(HEALTHY, nodes=(node(0, (Place("/data"),)), node(1, (Place("/data", "there is no such folder"),)))),
            "node 1 (b): cannot write to /data: there is no such folder; mount it there",
        ),
        (
            replace(HEALTHY, nodes=(node(0, (Place("s3://data"),)), node(1, (Place("s3://data", "", (0,)),)))),
            "node 1 (b): cannot read what node 0 (a) wrote to s3://data; give all nodes the same endpoint",
        ),
        (
            replace(HEALTHY, nodes=(replace(node(0), unreached={"1": "timed out"}), node(1))),
            "node 0 (a): no connection to node 1 (b): timed out; open all ports",
        ),
        (
            replace(HEALTHY, nodes=(node(0), replace(node(1), address="127.0.1.1"))),
            "node 1 (b): its own name b means 127.0.1.1, at which no other node finds it; give the name its address",
        ),
        (replace(HEALTHY, ranks=(), unmeasured="they hid"), "links: were not measured: they hid"),
        (replace(HEALTHY, ranks=RANKS[:3]), "node 1 (b): rank 3 has said nothing more; look at the network"),
        (replace(HEALTHY, ranks=(*RANKS[:3], rank(3, error="no NCCL"))), "node 1 (b): rank 3: no NCCL; look at"),
        (
            replace(HEALTHY, ranks=(replace(RANKS[0], clocks=(Clock(1, -7.5, 0.1),)), *RANKS[1:])),
            "node 1 (b): its clock is 7.50 s behind that of node 0 (a); let chrony",
        ),
        (
            with_link(Link((0, 2), 50.0, 9000.0, 0.02)),
            "node 0 (a) rank 0 - node 1 (b) rank 2: 50 MB/s on the way there, 2262 are wanted",
        ),
        (
            with_link(Link((0, 2), 9000.0, 9000.0, 31.0)),
            "node 0 (a) rank 0 - node 1 (b) rank 2: 31.00 ms one way, 5 are wanted",
        ),
    ],
)
def test_each_fault_is_one_line_that_names_its_node_and_a_remedy(found: Examination, line: str) -> None:
    assert len(said(found)) == 1 and said(found)[0].startswith(line), said(found)
    examination_text(found, MACHINE)


def test_a_skew_within_the_round_trip_is_none() -> None:
    slow = replace(HEALTHY, ranks=(replace(RANKS[0], clocks=(Clock(1, 2.0, 4.0),)), *RANKS[1:]))
    assert said(slow) == []


def test_of_many_bad_links_the_worst_are_named_and_the_rest_counted() -> None:
    machine = MachineConfig(nodes=20, processes=1, host="a", device="cpu")
    links = tuple(Link((0, i), float(i), 9000.0, 0.1) for i in range(1, 20))
    nodes = tuple(replace(node(0), node=i, host=f"h{i}") for i in range(20))
    found = said(
        Examination(nodes, {}, tuple(replace(rank(i), links=links if i == 0 else ()) for i in range(20)), ""), machine
    )
    assert len(found) == 11 and "node 1 (h1): 1 MB/s on the way there" in found[0] and "9 more" in found[-1]


def test_no_process_group_is_tried_where_nodes_are_lost_or_cannot_reach_each_other() -> None:
    assert obstacle(HEALTHY.nodes, {}, MACHINE) == ""
    assert "node 1" in obstacle(HEALTHY.nodes[:1], {"1": "lost"}, MACHINE)
    assert obstacle((node(0), replace(node(1), unreached={"0": "refused"})), {}, MACHINE)
    loopback = (node(0), replace(node(1), address="127.0.0.1"))
    assert obstacle(loopback, {}, MACHINE) and not obstacle(loopback[1:], {}, MachineConfig())


@pytest.mark.parametrize("ahead_s", [-3.5, 0.0, 0.25])
def test_a_clock_is_read_right_through_any_delay(ahead_s: float) -> None:
    pings = []
    for there_s, back_s in ((0.2, 0.3), (0.001, 0.001), (0.5, 0.0)):  # delays of the two ways
        pings.append((100.0, 100.0 + there_s + ahead_s, 100.0 + there_s + back_s))
    found, round_trip_s = clock_ahead(pings)
    assert abs(found - ahead_s) <= round_trip_s / 2 and round_trip_s == pytest.approx(0.002)


@pytest.mark.parametrize("n", range(1, 10))
def test_in_the_rounds_every_pair_meets_once_and_nobody_two_at_a_time(n: int) -> None:
    pairs = []
    for met in rounds(n):
        assert all(met[met[one]] == one for one in range(n))
        pairs += [(one, met[one]) for one in range(n) if one < met[one]]
    assert sorted(pairs) == [(a, b) for a in range(n) for b in range(a + 1, n)]
    assert len(rounds(n)) == (0 if n == 1 else n - 1 + n % 2)


def test_facts_and_reports_survive_json() -> None:
    facts = inspect_node("nowhere/yet")
    assert facts.memory_gib >= facts.available_gib > 0 and facts.disk_gib > 0
    assert facts.versions["torch"] and "missing" not in facts.versions.values()
    report = replace(node(0, (Place("/data", "", (1,)),)), facts=facts)
    assert build(NodeReport, json.loads(json.dumps(to_dict(report)))) == report
    assert all(build(RankReport, json.loads(json.dumps(to_dict(one)))) == one for one in RANKS)


def test_lines_of_nvidia_smi_that_are_no_gpu_are_passed_over() -> None:
    assert len(GPUS) == 2 and GPUS[0].memory_gib == pytest.approx(79.65, abs=0.01)
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n\n") == ()


def test_work_that_hangs_or_fails_says_what_it_was_doing() -> None:
    def hang(doing: Doing) -> None:
        doing.name = "sleeping"
        time.sleep(5)

    def fail(doing: Doing) -> None:
        doing.name = "writing"
        raise OSError("disk full\nand more")

    assert within(0.1, hang) == (None, "sleeping did not end within 0.1 s")
    assert within(5, fail) == (None, "writing failed: disk full")
    assert within(5, lambda doing: 3) == (3, "")


@pytest.fixture
def meetings():
    """Two nodes that meet in one process."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    guest = TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=10))
    return Meeting(store, 0, 2), Meeting(guest, 1, 2)


def test_nodes_hear_each_other_and_those_that_say_nothing_are_left_out(meetings) -> None:
    first, second = meetings
    hellos = {0: Hello("a", "10.0.0.1", 1), 1: Hello("b", "10.0.0.2", 2)}
    first.tell("hello", hellos[0])
    second.tell("hello", hellos[1])
    assert first.hear("hello", Hello, range(2), 1) == second.hear("hello", Hello, range(2), 1) == hellos
    assert second.hear("report", Hello, range(2), 0.1) == {}
    first.decide("go", Answer(True))
    assert second.learn("go", Answer, 1) == Answer(True)
    with pytest.raises(RuntimeError, match="node 0 has not said 'trial'"):
        second.learn("trial", Trial, 0.1)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "{}", '{"host": "a"}', '{"host": "a", "address": "b", "port": 1e999}', '{"a": ' * 100_000, b"\xff"],
    ids=["empty", "a list", "a number", "no keys", "a key less", "infinite", "deep", "no text"],
)  # fmt: skip
def test_what_a_peer_says_wrong_is_one_line(meetings, text) -> None:
    meetings[1].store.set("hello/1", text)
    with pytest.raises(ConnectionError, match=r"^what another node says as 'hello/1'") as raised:
        meetings[0].hear("hello", Hello, [1], 1)
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_a_peer_cannot_name_a_file_outside_the_places_nor_steer_the_terminal(meetings) -> None:
    meetings[0].store.set("trial", json.dumps({"token": "../../x", "nodes": [0, 1], "limit_s": 5.0}))
    with pytest.raises(ConnectionError, match="is none of a doctor's"):
        meetings[1].learn("trial", Trial, 1)
    assert printable("node 1 (\x1b]0;x\x07)\n") == "node 1 (?]0;x?)\n"


def test_on_one_machine_ports_and_doors_are_closed_to_others() -> None:
    meeting, door = meet(MachineConfig(port=0), 5), Door(door_name(0), LOOPBACK)
    run_s = serve_store("node0", 0, 1, timedelta(seconds=5))
    torchs = StaticTCPRendezvous(LOOPBACK, run_s.port, 0, 1, "a run", 5)  # as the launcher then meets, in this process
    torchs.next_rendezvous().store.set("key", "value")
    assert run_s.get("a run/key") == b"value"
    listening = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    ports = {meeting.store.port, run_s.port, door.port}
    assert {one.port for one in listening} >= ports
    assert {one.ip for one in listening if one.port in ports} == {LOOPBACK}
    door.close()
    meeting.leave([0])


def test_the_first_of_several_nodes_listens_where_the_others_find_it() -> None:
    assert own_address("localhost") == own_address("127.0.0.1") == own_address("192.0.2.1") == ""
    mine = {one.address for all_of in psutil.net_if_addrs().values() for one in all_of if one.family == socket.AF_INET}
    for address in mine - {LOOPBACK}:
        assert own_address(address) == address
    everywhere = listen("", 0)  # where its own name means loopback, as in Debian's /etc/hosts
    socket.create_connection((next(iter(mine - {LOOPBACK}), LOOPBACK), everywhere.getsockname()[1])).close()
    everywhere.close()


def test_the_first_node_s_port_is_free_again_after_the_meeting() -> None:
    port = TCPStore("localhost", 0, is_master=True, wait_for_workers=False).port
    for _ in range(2):
        machine = replace(MACHINE, host="127.0.0.2", port=port)
        first = meet(machine, 5)
        second = meet(replace(machine, node_rank=1), 5)
        leaving = threading.Thread(target=first.leave, args=[(0, 1)])
        leaving.start()
        second.leave((0, 1))
        leaving.join()


@pytest.mark.parametrize("place", ["tmp_path", "bucket_folder"])
def test_a_place_is_shared_if_all_read_what_each_has_written(place: str, meetings, request) -> None:
    url = str(request.getfixturevalue(place))
    trial, found = Trial("token", (0, 1), 5), {}

    def visit(meeting: Meeting) -> None:
        found[meeting.node] = trial.of(url, meeting, Doing())

    threads = [threading.Thread(target=visit, args=[meeting]) for meeting in meetings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: Place(url), 1: Place(url)}
    for one in (0, 1):
        trial.clear(url, one)
    assert not trial._reads(url, 0) and not trial._reads(url, 1)
    assert storage.list_tree(url) == {} and storage.list_folders(url) == []


def test_a_place_that_others_write_elsewhere_or_that_is_not_there_is_found(meetings, tmp_path) -> None:
    meetings[1].tell(f"wrote {tmp_path}", Answer(True))  # to another file system
    assert Trial("token", (0, 1), 5).of(str(tmp_path), meetings[0], Doing()) == Place(str(tmp_path), "", (1,))
    gone = str(tmp_path / "gone")
    assert Trial("token", (0,), 1).of(gone, meetings[0], Doing()) == Place(gone, "there is no such folder")


def test_a_node_that_does_not_open_or_is_another_is_not_reached() -> None:
    door, other = Door(door_name(1), "127.0.0.1"), Door("a printer", "127.0.0.1")
    closed = Door(door_name(2), "127.0.0.1")
    closed.close()
    hellos = {1: Hello("b", "127.0.0.1", door.port), 2: Hello("c", "127.0.0.1", closed.port)}
    found = knock({**hellos, 3: Hello("d", "127.0.0.1", other.port)})
    assert set(found) == {"2", "3"} and "refused" in found["2"] and "a printer" in found["3"]
    door.close()
    other.close()


def test_two_processes_of_this_machine_are_examined(bucket_folder, tmp_path) -> None:
    given = [
        f"shared={tmp_path}",
        f"bucket={bucket_folder}",
        "machine.port=0",
        f"report={tmp_path / 'report.json'}",
        "megabytes=2",
    ]
    loose = [f"limits.{name}=0" for name in ("disk_gib", "temp_gib", "shm_gib", "memory_gib", "mb_per_s", "slow_share")]
    done = run(
        ["python", "-m", "launch", "doctor", "configs/machines/laptop.yaml", *given, *loose, "limits.latency_ms=1e4"]
    )
    assert done.returncode == 0 and "no problem found" in done.stdout, done.stdout + done.stderr
    found = build(Examination, json.loads((tmp_path / "report.json").read_text()))
    assert [one.rank for one in found.ranks] == [0, 1] and found.ranks[0].all_reduce_mb_per_s
    (link,) = found.ranks[0].links
    assert link.ranks == (0, 1) and link.mb_per_s > 0
    assert found.nodes[0].places == (Place(str(tmp_path)), Place(bucket_folder))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def start(*words: str) -> int:
    return run_words("launch", VERBS, ["doctor", *words])


def test_a_port_that_is_taken_is_a_problem_of_one_line(capsys, monkeypatch) -> None:
    taken = Door("somebody else", "127.0.0.1")
    monkeypatch.chdir(ROOT)
    assert start("configs/machines/laptop.yaml", f"machine.port={taken.port}") == 1
    said = capsys.readouterr().out
    assert (
        said.startswith(f"problem: node 0: port {taken.port} of this node cannot be listened on")
        and said.count("\n") == 1
    )
    taken.close()


def test_a_scheduler_s_nodes_run_the_doctor_told_which_of_them_they_are(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    words = ["configs/machines/slurm.yaml", "shared=/data", "script=job.sh", "dry_run=true"]
    config = read_doctor(words)
    text = config.machine.render(doctor_job(config, words))
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
    words = ["configs/machines/kubernetes.yaml", "bucket=s3://data"]
    config = read_doctor(words)
    service, job = config.machine.kubernetes.manifests(config.machine, doctor_job(config, words))
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
        (["configs/machines/laptop.yaml", "bucket=/data"], "must begin with s3://"),
        (["configs/machines/laptop.yaml", "timeout_s=1"], "must be 5 or more"),
        (["configs/machines/laptop.yaml", "limits.slow_share=2"], "at most 1"),
        (["configs/machines/laptop.yaml", "script=job.sh"], "slurm and kubernetes"),
        (["shared=/data"], "configs/machines"),
    ],
)
def test_a_wrong_word_is_one_line(given: list[str], line: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert start(*given) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
