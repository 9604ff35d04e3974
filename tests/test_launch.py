"""Machine and settings become the exact command, script or manifests, and a bad run is refused before it is queued."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from rendered import require_valid_manifests, require_valid_script, run_container, step_of, write_programs
from tiny_training import ROOT

from configs import build, load_config
from configs.cli import run as run_args
from configs.errors import UserError
from launch.__main__ import VERBS
from launch.local import supervise
from launch.machine import MachineConfig
from launch.run import Launch, accelerate_line, read_launch
from launch.scheduler import TRAINERS, Cluster, Job, Scheduler
from train.config import TrainConfig
from train.exit import needs_a_person

MACHINES = {path.stem: str(path) for path in sorted((ROOT / "configs" / "machines").glob("*.yaml"))}


@pytest.fixture
def args(train_args, tmp_path) -> list[str]:
    return [*train_args, f"out={tmp_path / 'run with space'}", "batch=1"]


@pytest.fixture
def read(args, tmp_path) -> Callable[..., Launch]:
    """A run on one of our machines, with more settings; in Kubernetes the test's folder is the volume."""
    return lambda machine, *more: read_launch([MACHINES[machine], *args, f"machine.kubernetes.mount={tmp_path}", *more])


def start(*args: str) -> int:
    return run_args("launch", VERBS, list(args), default="run")


def test_a_local_run_is_one_line_that_can_be_typed(args, capsys) -> None:
    assert start(MACHINES["laptop"], *args, "dry_run=true") == 0
    line = shlex.split(capsys.readouterr().out)
    begin = line.index("python")
    assert "DS_ACCELERATOR=cpu" in line[:begin]
    assert line[begin:] == [
        "python", "-m", "launch", "accelerate", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "29500",
        "--use_deepspeed", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train", *args,
    ]  # fmt: skip


def test_a_node_of_several_is_told_its_number_and_where_the_first_is(args, read) -> None:
    settings = ["machine.nodes=2", "machine.processes=2", "machine.host=node0", "machine.node_rank=1"]
    run = read("eight_gpus", *settings, "engine.name=fsdp2")
    line = run.machine.render(run.job)
    assert "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip node0" in line
    assert "--multi_gpu" in line and "deepspeed" not in line.partition("-m train")[0]
    # What a machine's file says of the run reaches it, after the run's own files and before the settings.
    trained = line.partition("-m train ")[2]
    assert trained.startswith(f"{args[0]} engine.precision=bf16 ") and trained.rstrip().endswith("engine.name=fsdp2")


def test_a_crashed_run_is_started_again_and_a_wrong_one_is_not(tmp_path) -> None:
    def crash(status: int, restarts: int) -> tuple[int, int]:
        (tmp_path / "starts").unlink(missing_ok=True)
        line = ["bash", "-c", f"echo >> {tmp_path}/starts; test $(wc -l < {tmp_path}/starts) -ge 3 || exit {status}"]
        return supervise(line, dict(os.environ), restarts), len((tmp_path / "starts").read_text())

    assert crash(1, restarts=5) == (0, 3)
    assert crash(1, restarts=1) == (1, 2)
    assert crash(2, restarts=5) == (2, 1)


def test_a_users_error_in_the_trainers_is_no_crash_though_their_launcher_ends_with_1(args, tmp_path, capfd) -> None:
    (tmp_path / "run with space").write_text("a file")
    settings = [*args, "machine.port=0", "machine.max_restarts=3", "engine.name=fsdp2"]
    assert start(MACHINES["laptop"], *settings) == 2
    output = capfd.readouterr()
    assert output.err.count("is a file; choose another out=") == 1 and "started again" not in output.out


def manifests(run: Launch) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Service, Job, and the container of its pod."""
    service, job = run.machine.kubernetes.manifests(run.machine, run.job)
    return service, job, job["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("ending", "status", "of_pod"), [("asked to stop", 0, 75), ("fault", 1, 2), ("", 1, 1), ("", 0, 0)]
)
def test_a_pod_tells_how_its_run_ended_and_a_fault_fails_the_job(read, tmp_path, ending, status, of_pod) -> None:
    _, job, container = manifests(read("kubernetes"))
    write_programs(tmp_path, python=f'printf "{ending}" > "$WORLDLOOM_ENDED"; exit {status}')
    assert run_container(container, tmp_path).returncode == of_pod
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob" and (of_pod in rule["onExitCodes"]["values"]) == (ending == "fault")


def test_a_launch_that_is_asked_to_stop_passes_it_on_to_its_trainers_and_they_save(args, tmp_path) -> None:
    out, settings = tmp_path / "run with space", ["steps=100000", "machine.port=0", "validation.every=100000"]
    line = ["python", "-m", "launch", MACHINES["laptop"], *args, *settings, "engine.name=fsdp2"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    connections = [connection for each in processes for connection in each.net_connections("tcp")]
    listening = [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert len(listening) >= 3 and set(listening) == {"127.0.0.1"}  # the rendezvous, and gloo's of two ranks
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "as asked" in output, output[-2000:]
    assert (out / "STOPPED").exists() and list(out.glob("step_*/COMPLETE"))


def test_a_failed_process_is_named_by_its_launcher_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import os\nraise SystemExit(3 * int(os.environ['RANK']))\n")
    options = ["--config_file", "launch/accelerate/cpu_plain.yaml", "--num_processes", "2", "--main_process_port", "0"]
    line = [sys.executable, "-m", "launch", "accelerate", *options, str(tmp_path / "fails.py")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == "launch accelerate: rank 1 ended with status 3"


def test_the_slurm_script_is_valid_and_starts_every_node(read, tmp_path) -> None:
    mounts = f"/data:/data,{tmp_path}:{tmp_path}:rw"
    slurm = {"partition": "gpu", "container": "/images/w.sqsh", "mounts": mounts, "logs": f"{tmp_path}/logs"}
    run = read("slurm", *(f"machine.slurm.{name}={value}" for name, value in slurm.items()))
    text = run.machine.render(run.job)
    require_valid_script(text, tmp_path / "job.sh")
    options = {
        "nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "partition=gpu", "signal=USR1@180", "requeue",
        "cpus-per-task=64",
    }  # fmt: skip
    assert {f"#SBATCH --{option}" for option in options} <= set(text.splitlines())
    step, line = step_of(text)
    assert step[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=64"]
    assert step[3:7] == ["--container-image", "/images/w.sqsh", "--container-mounts", mounts]
    assert line[:7] == ["accelerate", "--num_processes", "32", "--num_machines", "4", "--machine_rank", "3"]
    assert line[7:9] == ["--main_process_ip", "node17"] and f"out={tmp_path / 'run with space'}" in line


HOSTILE = "x$(touch PWNED)`touch PWNED`';touch PWNED;'\"\ntouch PWNED\n#SBATCH --wrap=touch"


def run_script(text: str, folder: Path) -> list[str]:
    """The arguments that the launcher gets when bash runs the Slurm script `text` in `folder`."""
    srun = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
    write_programs(folder / "bin", srun=srun, scontrol="echo node0", python='printf "%s\\0" "$@"')
    (folder / "job.sh").write_text(text)
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    env |= {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_NODEID": "1"}
    done = subprocess.run(["bash", "job.sh"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_arguments_names_and_values_are_never_run_as_shell(read, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("$(touch PWNED).yaml").write_text("seed: 3\n")
    mine = ["$(touch PWNED).yaml", f"wandb_project={json.dumps(HOSTILE)}", "init=$HOME", f"out={tmp_path}/o$$(A)"]
    settings = ["machine.env.A=changed", f"machine.env.B={json.dumps(HOSTILE)}", "machine.slurm.setup=date"]
    on_slurm, in_pods = (read(kind, *mine, *settings) for kind in ("slurm", "kubernetes"))
    scripts = run_script(on_slurm.machine.render(on_slurm.job), tmp_path)
    pods = run_container(manifests(in_pods)[2], tmp_path / "bin").stdout.split("\0")[:-1]
    for line, run in ((scripts, on_slurm), (pods, in_pods)):
        assert tuple(line[line.index("train") + 1 :]) == run.args and set(mine) <= set(run.args)
        assert line[line.index("--machine_rank") + 1] == "1"
    assert not list(tmp_path.rglob("*PWNED")) and Path("$(touch PWNED).yaml").exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_the_slurm_script_queues_a_stopped_or_crashed_run_again_and_no_other(read, tmp_path, absolute) -> None:
    logs = tmp_path / "logs" if absolute else Path("logs")
    run = read("slurm", "machine.slurm.setup=date", f"machine.slurm.logs={logs}")
    scontrol = f'echo "$@" >> {tmp_path}/calls; echo node0'
    write_programs(tmp_path / "bin", srun='eval "$SRUN_DOES"; exit ${SRUN_STATUS:-0}', scontrol=scontrol)
    (tmp_path / "job.sh").write_text(run.machine.render(run.job))

    def submit(**env: str) -> tuple[int, bool]:
        """The exit status, and whether the job is queued again."""
        (tmp_path / "calls").unlink(missing_ok=True)
        env |= {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, "requeue 7" in (tmp_path / "calls").read_text()

    assert submit() == (0, False)
    assert submit(SRUN_STATUS="3") == (3, True)
    assert submit(SRUN_STATUS="3", SLURM_RESTART_COUNT="3") == (3, False)
    (tmp_path / logs).mkdir()  # as Slurm must have it
    assert submit(SRUN_STATUS="1", SRUN_DOES='printf fault > "$WORLDLOOM_ENDED"') == (1, False)
    assert not list((tmp_path / logs).iterdir())
    assert submit(SRUN_STATUS="3", SRUN_DOES="kill -TERM $PPID") == (3, True)
    (tmp_path / logs / "ended_7").write_text("asked to stop")  # of the time before
    assert submit(SRUN_STATUS="3", SLURM_RESTART_COUNT="57") == (3, False)
    assert submit(SRUN_DOES='printf "asked to stop" > "$WORLDLOOM_ENDED"', SLURM_RESTART_COUNT="57") == (0, True)


def test_the_kubernetes_manifests_are_valid_and_yaml_that_says_the_same(read) -> None:
    odd = {"A": "1e3", "B": "yes", "C": "a: b #c", "D": "\U0001f600 é\n\tx", "E": "---\n- *x", "F": "$(A) $$ $B"}
    run = read("kubernetes")
    run = replace(run, machine=replace(run.machine, env=odd))
    service, job, container = manifests(run)
    pod = require_valid_manifests(service, job)
    assert list(yaml.safe_load_all(run.machine.render(run.job))) == [service, job]
    assert job["spec"]["completions"] == 2 and job["spec"]["backoffLimit"] == 2 * 3
    ignored = [rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]]
    assert ignored == [[2], [75]]  # a fault fails the Job, one that has saved is made anew
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert env["D"] == odd["D"] and env["F"] == "$$(A) $$$ $B"  # Kubernetes makes `$(A) $$ $B` of it
    assert "--main_process_ip worldloom-0.worldloom" in container["command"][-1]
    assert '--machine_rank "$JOB_COMPLETION_INDEX"' in container["command"][-1]
    assert service["metadata"]["name"] == pod["subdomain"] == "worldloom" and service["spec"]["clusterIP"] == "None"


def test_the_pod_tells_its_trainers_and_not_its_launcher() -> None:
    assert re.match(TRAINERS, "/venv/bin/python3.12 -u -m train a.yaml")
    assert not re.match(TRAINERS, "/usr/bin/python /usr/bin/accelerate launch -m train a.yaml")


FILES = {
    "cpu_zero2": (MachineConfig(processes=2, device="cpu"), "deepspeed"),
    "cpu_plain": (MachineConfig(processes=2, device="cpu"), "fsdp2"),
    "1gpu": (MachineConfig(), "ddp"),
    "8gpu_zero2": (MachineConfig(processes=8), "deepspeed"),
    "multi_node_zero3": (MachineConfig(nodes=4, processes=8, node_rank=1, host="node0"), "deepspeed"),
    "multi_node_fsdp2": (MachineConfig(nodes=4, processes=8, node_rank=1, host="node0"), "fsdp2"),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch/accelerate").iterdir()))
def test_accelerate_reads_a_file_of_ours_as_the_line_that_launch_prints(name: str) -> None:
    machine, engine = FILES[name]
    node = ["--machine_rank", "1", "--main_process_ip", "node0"] if machine.nodes > 1 else []
    file = ["--config_file", str(ROOT / f"launch/accelerate/{name}.yaml"), *node, "-m", "train", "a.yaml"]
    line = accelerate_line(machine, engine, ["a.yaml"])[4:]
    parsed = [vars(_validate_launch_command(launch_command_parser().parse_args(args))[0]) for args in (file, line)]
    parts = ["use_deepspeed", "multi_gpu", "use_fsdp", "cpu", "num_processes", "num_machines", "machine_rank"]
    parts += ["main_process_ip", "deepspeed_multinode_launcher", "module", "training_script", "training_script_args"]
    # What is not given is nothing: rank 0, no host, no such engine.
    of_file, of_line = ({part: each[part] or 0 for part in parts} for each in parsed)
    assert of_file == of_line
    assert parsed[0]["main_process_port"] in (None, parsed[1]["main_process_port"])  # 29500 is Accelerate's own


def test_a_value_may_refer_to_what_another_file_says(args, tmp_path) -> None:
    machine, own = tmp_path / "machine.yaml", tmp_path / "own.yaml"
    machine.write_text("machine: {device: cpu}\nwandb_project: on ${engine.name}\n")
    own.write_text("engine: {name: ddp}\noptim: {warmup_steps: '${log_every}'}\n")
    run = read_launch([str(machine), *args, str(own)])
    assert run.train.wandb_project == "on ddp" and run.train.optim.warmup_steps == run.train.log_every
    assert load_config(TrainConfig, run.args) == run.train


NO_DISK = OSError("cannot write step_0000004")
NO_DISK.__cause__ = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (ValueError("a wrong word"), True), (FileNotFoundError("no manifest"), True), (PermissionError("no"), True),
        (NO_DISK, True), (OSError(errno.EROFS, "read-only"), True), (OSError(errno.ESTALE, "stale"), False),
        (OSError("the server gives no answer"), False), (ConnectionResetError(), False),
    ],
)  # fmt: skip
def test_only_what_a_person_has_to_mend_keeps_a_run_from_being_started_again(error: Exception, needed: bool) -> None:
    assert needs_a_person(error) == needed


@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_takes_a_run(machine: str, read) -> None:
    run = read(machine, "machine.processes=1")
    assert "launch accelerate" in run.machine.render(run.job)


CONTAINER = ("slurm", "machine.nodes=1", "machine.processes=1", "machine.slurm.container=w.sqsh")


@pytest.mark.parametrize(
    ("machine", "error"),
    [
        (["slurm", "machine.slrum.time=1"], "did you mean 'machine.slurm'"),
        (["slurm", "optim.learning_rat=1"], "did you mean 'optim.learning_rate'"),
        (["slurm", "manifest=nowhere.json"], "nowhere.json"),
        (["slurm", "machine.slurm.logs=my logs"], "--output='my logs"),
        (["kubernetes", "machine.processes=1"], "ends with its pod"),
        (["kubernetes", "machine.name=My_Run"], "machine.name=My_Run"),
        ([*CONTAINER, "machine.slurm.mounts=/data:/data"], "ends with its container"),
        (["eight_gpus", "machine.nodes=2"], "machine.host"),
        (["eight_gpus", "machine.processes=0"], "machine.processes=0"),
        ([], "configs/machines"),
    ],
)
def test_a_bad_run_is_refused_before_anything_is_queued(args, capsys, tmp_path, machine, error: str) -> None:
    script, files = tmp_path / "job.sh", [MACHINES[name] for name in machine[:1]]
    assert start(*files, *args, *machine[1:], f"script={script}") == 2
    output = capsys.readouterr().err
    assert error in output and len(output.splitlines()) == 1
    assert not script.exists()


def test_a_file_that_launch_did_not_write_is_not_written_over(args, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no sbatch there: the script is written all the same
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    run = [MACHINES["slurm"], *args, "machine.nodes=1", "machine.processes=1", f"machine.slurm.logs={tmp_path}/logs"]
    for _ in range(2):
        assert start(*run, f"script={tmp_path}/job.sh") == 2
        assert "job.sh is written, but there is no sbatch" in capsys.readouterr().err
    for name in ("notes.txt", "folder", "link"):
        assert start(*run, f"script={tmp_path / name}") == 2
        assert f"{name} is there and was not written by this command" in capsys.readouterr().err
    assert start("doctor", MACHINES["laptop"], f"report={tmp_path}/notes.txt") == 2
    assert start(*run, "script=s3://bucket/job.sh") == 2 and "not to a bucket" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"name": "x\ntouch PWNED\n#"}, "machine.name="),
        ({"name": "../x"}, "machine.name='../x'"),
        ({"slurm": {"cpus_per_task": -1}}, "slurm.cpus_per_task=-1"),
        ({"env": {"A;touch PWNED;B": "x"}}, "is no variable's name"),
        ({"env": {"A": "\0"}}, "holds characters"),
        ({"env": {"A": "\udcff"}}, "holds characters"),
        ({"processes": 10**9}, "processes=1000000000"),
        ({"node_rank": 1}, "machine.node_rank=1"),
        ({"port": 99999999}, "port=99999999"),
        ({"port": 0, "nodes": 2, "host": "a"}, "machine.port=0"),
    ],
)
def test_settings_of_a_machine_that_cannot_be_are_named(settings: dict, error: str) -> None:
    with pytest.raises(UserError, match=re.escape(error)) as raised:
        build(MachineConfig, settings)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("value", ["l\ntouch PWNED", "a b --wrap=x", "1G#x", "1\u2028#SBATCH", 'a"b'])
@pytest.mark.parametrize("name", ["logs", "partition", "account", "memory", "time"])
def test_options_of_slurm_are_single_words(name: str, value: str) -> None:
    machine = build(MachineConfig, {"kind": "slurm", "slurm": {name: value}})
    with pytest.raises(UserError, match=r"machine\.slurm: --|holds characters"):
        machine.render(Job("a", lambda rank, host: ["date"], saves_to="/runs"))


@dataclass(frozen=True)
class Toy(Scheduler):
    """A scheduler is its own file and one line."""

    queue: str = "short"

    def render(self, cluster: Cluster, job: Job) -> str:
        return f"{self.queue} {cluster.nodes} {job.name}: {shlex.join(job.line('0', 'node0'))}\n"


@dataclass(frozen=True)
class ToyMachines(MachineConfig):
    toy: Toy = field(default_factory=Toy)  # the line


def test_a_scheduler_is_its_own_file_and_one_line(read) -> None:
    machine = build(ToyMachines, {"kind": "toy", "nodes": "2", "toy": {"queue": "long"}})
    assert machine.render(read("laptop").job).startswith("long 2 worldloom: python -m launch accelerate")
    with pytest.raises(UserError, match=r"machine.kind=toi must be one of local, slurm, kubernetes, toy"):
        build(ToyMachines, {"kind": "toi"})
