"""Machine and words become the exact command, script or manifests, and a bad run is refused before it is queued."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_training import ROOT, run

from configs import build, load_config
from configs.cli import run as run_words
from launch.__main__ import VERBS
from launch.local import supervise
from launch.machine import MachineConfig
from launch.run import Launch, accelerate_line, read_launch
from launch.scheduler import TRAINERS, Cluster, Job, Scheduler, shell_line
from train.config import TrainConfig
from train.exit import needs_a_person

MACHINES = sorted((ROOT / "configs" / "machines").glob("*.yaml"))


@pytest.fixture
def words(train_words, tmp_path) -> list[str]:
    return [*train_words, f"out={tmp_path / 'run with space'}", "batch=1"]


def start(*words: str) -> int:
    return run_words("launch", VERBS, list(words), default="run")


def test_a_local_run_is_one_line_that_can_be_typed(words, capsys) -> None:
    assert start("configs/machines/laptop.yaml", *words, "dry_run=true") == 0
    line = shlex.split(capsys.readouterr().out)
    begin = line.index("python")
    assert "DS_ACCELERATOR=cpu" in line[:begin]
    assert line[begin:] == [
        "python", "-m", "launch", "accelerate", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "29500",
        "--use_deepspeed", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train", *words,
    ]  # fmt: skip


def test_a_node_of_several_is_told_its_number_and_where_the_first_is(words, capsys) -> None:
    given = ["machine.nodes=2", "machine.processes=2", "machine.host=node0", "machine.node_rank=1", "engine.name=fsdp2"]
    assert start("configs/machines/eight_gpus.yaml", *words, *given, "dry_run=true") == 0
    line = capsys.readouterr().out
    assert "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip node0" in line
    assert "--multi_gpu" in line and "deepspeed" not in line.partition("-m train")[0]
    # What a machine's file says of the run reaches it, after the run's own files and before the words.
    trained = line.partition("-m train ")[2]
    assert trained.startswith(f"{words[0]} engine.precision=bf16 ") and trained.rstrip().endswith("engine.name=fsdp2")


def test_a_local_run_trains(words, tmp_path) -> None:
    given = [*words, "steps=1", "validation.every=9", "machine.port=0"]
    done = run(["python", "-m", "launch", "configs/machines/laptop.yaml", *given])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run with space" / "step_0000001" / "COMPLETE").exists()


def test_a_crashed_run_is_started_again_and_a_wrong_one_is_not(tmp_path) -> None:
    def crash(status: int, restarts: int) -> tuple[int, int]:
        (tmp_path / "starts").unlink(missing_ok=True)
        line = ["bash", "-c", f"echo >> {tmp_path}/starts; test $(wc -l < {tmp_path}/starts) -ge 3 || exit {status}"]
        return supervise(line, dict(os.environ), restarts), len((tmp_path / "starts").read_text())

    assert crash(1, restarts=5) == (0, 3)
    assert crash(1, restarts=1) == (1, 2)
    assert crash(2, restarts=5) == (2, 1)


def test_a_run_that_was_told_something_wrong_is_not_started_again_though_the_launcher_ends_with_1(
    words, tmp_path, capfd
) -> None:
    (tmp_path / "run with space").write_text("a file")
    given = [*words, "machine.port=0", "machine.max_restarts=3", "engine.name=fsdp2"]
    assert start("configs/machines/laptop.yaml", *given) == 2
    said = capfd.readouterr()
    assert said.err.count("is a file; choose another out=") == 1
    assert "started again" not in said.out


def the_container(run: Launch) -> dict:
    job = run.machine.kubernetes.manifests(run.machine, run.job)[1]
    return job["spec"]["template"]["spec"]["containers"][0]


def write_programs(folder: Path, **programs: str) -> None:
    """Shell scripts that stand for programs of these names."""
    folder.mkdir(exist_ok=True)
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)


def in_a_pod(container: dict, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the container's command does with the programs of `folder`, after Kubernetes has put in what `$(NAME)` and
    `$$` stand for there."""
    env = {one["name"]: one["value"] for one in container["env"]}

    def put_in(text: str) -> str:
        return re.sub(r"\$(\$|\((.*?)\))", lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), text)

    env = {name: put_in(value) for name, value in env.items()}
    given = {**env, "PATH": f"{folder}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "1"}
    command = [put_in(word) for word in container["command"]]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("says", "status", "ends"), [("asked to stop", 0, 75), ("fault", 1, 2), ("", 1, 1), ("", 0, 0)]
)
def test_a_pod_says_how_its_run_ended_and_a_fault_fails_the_job(words, tmp_path, says, status, ends) -> None:
    asked = read_launch(["configs/machines/kubernetes.yaml", *words, f"machine.kubernetes.mount={tmp_path}"])
    write_programs(tmp_path, python=f'printf "{says}" > "$WORLDLOOM_ENDED"; exit {status}')
    assert in_a_pod(the_container(asked), tmp_path).returncode == ends
    job = asked.machine.kubernetes.manifests(asked.machine, asked.job)[1]
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob" and (ends in rule["onExitCodes"]["values"]) == (says == "fault")


def test_a_launch_that_is_asked_to_stop_passes_it_on_to_its_trainers_and_they_save(words, tmp_path) -> None:
    out, settings = tmp_path / "run with space", ["steps=100000", "engine.name=fsdp2", "machine.port=0"]
    line = ["python", "-m", "launch", "configs/machines/laptop.yaml", *words, *settings, "validation.every=100000"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    doors = [one.laddr for each in started for one in each.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert len(doors) >= 3 and {door.ip for door in doors} == {"127.0.0.1"}  # the rendezvous, and gloo's of two ranks
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "as asked" in said, said[-2000:]
    assert (out / "STOPPED").exists() and [path.name for path in out.glob("step_*/COMPLETE")]


def test_a_fault_of_the_processes_is_said_by_their_launcher_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import os\nraise SystemExit(3 * int(os.environ['RANK']))\n")
    given = ["--config_file", "launch/accelerate/cpu_plain.yaml", "--num_processes", "2", "--main_process_port", "0"]
    line = [sys.executable, "-m", "launch", "accelerate", *given, str(tmp_path / "fails.py")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == "launch accelerate: rank 1 ended with status 3"


def test_the_slurm_script_is_shell_that_says_what_it_should(words, tmp_path) -> None:
    given = [
        "machine.slurm.partition=gpu",
        "machine.slurm.container=/images/w.sqsh",
        f"machine.slurm.mounts=/data:/data,{tmp_path}:{tmp_path}:rw",
        f"machine.slurm.logs={tmp_path}/logs",
    ]
    asked = read_launch(["configs/machines/slurm.yaml", *words, *given])
    text = asked.machine.render(asked.job)
    path = tmp_path / "job.sh"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    checked = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8", "#SBATCH --partition=gpu",
        "#SBATCH --signal=USR1@180", "#SBATCH --requeue", "#SBATCH --cpus-per-task=64",
    ):  # fmt: skip
        assert line in text.splitlines(), text
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    step = shlex.split(srun)
    assert step[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=64"]
    assert step[3:7] == ["--container-image", "/images/w.sqsh", "--container-mounts", asked.machine.slurm.mounts]
    shown = ["bash", "-c", step[-1].replace("exec python -m", "printf '%s\\n'")]
    at = {"SLURM_NODEID": "3", "HEAD": "node17"}
    node = subprocess.run(shown, capture_output=True, text=True, env=at, check=True).stdout.splitlines()
    assert node[:8] == ["launch", "accelerate", "--num_processes", "32", "--num_machines", "4", "--machine_rank", "3"]
    assert node[8:10] == ["--main_process_ip", "node17"] and f"out={tmp_path / 'run with space'}" in node


HOSTILE = "x$(touch PWNED)`touch PWNED`';touch PWNED;'\"\ntouch PWNED\n#SBATCH --wrap=touch"


def run_script(text: str, folder: Path) -> list[str]:
    """The lines that the launcher gets as its words when bash runs the Slurm script `text` in `folder`."""
    srun = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
    write_programs(folder / "bin", srun=srun, scontrol="echo node0", python='printf "%s\\0" "$@"')
    (folder / "job.sh").write_text(text)
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    env |= {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_NODEID": "1"}
    done = subprocess.run(["bash", "job.sh"], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_words_names_and_values_are_never_run_as_shell(words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("$(touch PWNED).yaml").write_text("seed: 3\n")
    given = ["$(touch PWNED).yaml", f"wandb_project={json.dumps(HOSTILE)}", "init=$HOME", f"out={tmp_path}/o$$(A)"]
    settings = ["machine.env.A=changed", f"machine.env.B={json.dumps(HOSTILE)}", "machine.max_restarts=0"]
    machines = {kind: str(ROOT / f"configs/machines/{kind}.yaml") for kind in ("slurm", "kubernetes")}
    asked = read_launch([machines["slurm"], *words, *given, *settings, "machine.slurm.setup=export C=1"])
    slurm = run_script(asked.machine.render(asked.job), tmp_path)
    pods = read_launch([machines["kubernetes"], *words, *given, *settings, f"machine.kubernetes.mount={tmp_path}"])
    pod = in_a_pod(the_container(pods), tmp_path / "bin").stdout.split("\0")[:-1]
    for found, asked_of in ((slurm, asked), (pod, pods)):
        assert tuple(found[found.index("train") + 1 :]) == asked_of.args and set(given) <= set(asked_of.args)
        assert found[found.index("--machine_rank") + 1] == "1"
    assert not list(tmp_path.rglob("*PWNED")) and Path("$(touch PWNED).yaml").exists()


@pytest.mark.parametrize("absolute", [False, True])
def test_the_slurm_script_queues_a_stopped_or_crashed_run_again_and_no_other(words, tmp_path, absolute) -> None:
    logs = tmp_path / "logs" if absolute else Path("logs")
    given = ["machine.slurm.setup=date", f"machine.slurm.logs={logs}"]
    asked = read_launch(["configs/machines/slurm.yaml", *words, *given])
    tools = tmp_path / "bin"
    scontrol = f'echo "$@" >> {tmp_path}/calls; echo node0'
    write_programs(tools, srun='eval "$SRUN_DOES"; exit ${SRUN_STATUS:-0}', scontrol=scontrol)
    script = tmp_path / "job.sh"
    script.write_text(asked.machine.render(asked.job))

    def submit(**env: str) -> tuple[int, bool]:
        (tmp_path / "calls").unlink(missing_ok=True)
        given = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_JOB_ID": "7", **env}
        done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=given, capture_output=True, text=True)
        return done.returncode, "requeue 7" in (tmp_path / "calls").read_text()

    assert submit() == (0, False)
    assert submit(SRUN_STATUS="3") == (3, True)
    assert submit(SRUN_STATUS="3", SLURM_RESTART_COUNT="3") == (3, False)
    fault = 'printf fault > "$WORLDLOOM_ENDED"'
    (tmp_path / logs).mkdir()  # as Slurm must have it
    assert submit(SRUN_STATUS="1", SRUN_DOES=fault) == (1, False)
    assert not list((tmp_path / logs).iterdir())
    assert submit(SRUN_STATUS="3", SRUN_DOES="kill -TERM $PPID") == (3, True)
    (tmp_path / logs / "ended_7").write_text("asked to stop")  # of the time before
    assert submit(SRUN_STATUS="3", SLURM_RESTART_COUNT="57") == (3, False)
    assert submit(SRUN_DOES='printf "asked to stop" > "$WORLDLOOM_ENDED"', SLURM_RESTART_COUNT="57") == (0, True)


def test_the_kubernetes_manifests_are_valid(words, tmp_path) -> None:
    asked = read_launch(
        ["configs/machines/kubernetes.yaml", *words, "machine.env.A=b", f"machine.kubernetes.mount={tmp_path}"]
    )
    service, job = asked.machine.kubernetes.manifests(asked.machine, asked.job)
    for one in (service, job):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert job["spec"]["completions"] == 2 and job["spec"]["backoffLimit"] == 2 * 3
    ignored = [rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"][:2]]
    assert ignored == [[2], [75]]  # a fault fails the Job, one that has saved is made anew
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"name": "A", "value": "b"} in container["env"]
    assert "--main_process_ip worldloom-0.worldloom" in container["command"][-1]
    assert '--machine_rank "$JOB_COMPLETION_INDEX"' in container["command"][-1]
    assert service["metadata"]["name"] == pod["subdomain"] == "worldloom" and service["spec"]["clusterIP"] == "None"


def test_the_manifests_are_yaml_that_says_the_same(words, tmp_path) -> None:
    odd = {"A": "1e3", "B": "yes", "C": "a: b #c", "D": "\U0001f600 é\n\tx", "E": "---\n- *x", "F": "$(A) $$ $B"}
    given = read_launch(["configs/machines/kubernetes.yaml", *words, f"machine.kubernetes.mount={tmp_path}"])
    machine = replace(given.machine, env=odd)
    service, job = machine.kubernetes.manifests(machine, given.job)
    assert list(yaml.safe_load_all(machine.render(given.job))) == [service, job]
    env = {one["name"]: one["value"] for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["D"] == odd["D"] and env["F"] == "$$(A) $$$ $B"  # Kubernetes makes `$(A) $$ $B` of it


def test_the_pod_tells_its_trainers_and_not_its_launcher() -> None:
    lines = "/venv/bin/python3.12 -u -m train a.yaml\n/usr/bin/python /usr/bin/accelerate launch -m train a.yaml\n"
    found = subprocess.run(["grep", "-E", TRAINERS], input=lines, capture_output=True, text=True).stdout
    assert found == lines.splitlines(keepends=True)[0]


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
    found, wanted = (vars(_validate_launch_command(launch_command_parser().parse_args(one))[0]) for one in (file, line))
    parts = ["use_deepspeed", "multi_gpu", "use_fsdp", "cpu", "num_processes", "num_machines", "machine_rank"]
    parts += ["main_process_ip", "deepspeed_multinode_launcher", "module", "training_script", "training_script_args"]
    # What is not given is nothing: rank 0, no host, no such engine.
    assert {part: found[part] or 0 for part in parts} == {part: wanted[part] or 0 for part in parts}
    assert found["main_process_port"] in (None, wanted["main_process_port"])  # 29500 is Accelerate's own


def test_a_value_may_refer_to_what_another_file_says(words, tmp_path) -> None:
    machine, own = tmp_path / "machine.yaml", tmp_path / "own.yaml"
    machine.write_text("machine: {device: cpu}\nwandb_project: on ${engine.name}\n")
    own.write_text("engine: {name: ddp}\noptim: {warmup_steps: '${log_every}'}\n")
    asked = read_launch([str(machine), *words, str(own)])
    assert asked.train.wandb_project == "on ddp" and asked.train.optim.warmup_steps == asked.train.log_every
    assert load_config(TrainConfig, asked.args) == asked.train


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


@pytest.mark.parametrize("machine", MACHINES, ids=lambda path: path.stem)
def test_every_machine_takes_a_run(machine: Path, words, tmp_path, capsys) -> None:
    given = [f"machine.kubernetes.mount={tmp_path}", "machine.processes=1", "dry_run=true"]
    assert start(str(machine), *words, *given) == 0
    assert "launch accelerate" in capsys.readouterr().out


CONTAINER = ("configs/machines/slurm.yaml", "machine.nodes=1", "machine.processes=1", "machine.slurm.container=w.sqsh")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["configs/machines/slurm.yaml", "machine.slrum.time=1"], "did you mean 'machine.slurm'"),
        (["configs/machines/slurm.yaml", "optim.learning_rat=1"], "did you mean 'optim.learning_rate'"),
        (["configs/machines/slurm.yaml", "manifest=nowhere.json"], "nowhere.json"),
        (["configs/machines/kubernetes.yaml", "machine.processes=1"], "ends with its pod"),
        (["configs/machines/kubernetes.yaml", "machine.name=My_Run"], "machine.name=My_Run: Kubernetes takes"),
        ([*CONTAINER, "machine.slurm.mounts=/data:/data"], "ends with its container"),
        (["configs/machines/eight_gpus.yaml", "machine.nodes=2"], "machine.host"),
        (["configs/machines/eight_gpus.yaml", "machine.processes=0"], "machine.processes=0"),
        ([], "configs/machines"),
    ],
)
def test_a_bad_run_is_refused_before_anything_is_queued(words, capsys, tmp_path, given: list[str], said: str) -> None:
    script = tmp_path / "job.sh"
    assert start(*given[:1], *words, *given[1:], f"script={script}") == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not script.exists()


def test_a_file_that_launch_did_not_write_is_not_written_over(words, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no sbatch there: the script is written all the same
    script, notes = tmp_path / "job.sh", tmp_path / "notes.txt"
    notes.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    one = ["configs/machines/slurm.yaml", *words, "machine.nodes=1", "machine.processes=1"]
    one += [f"machine.slurm.logs={tmp_path}/logs"]
    for _ in range(2):
        assert start(*one, f"script={script}") == 2
        assert "job.sh is written, but there is no sbatch" in capsys.readouterr().err
    for there in (notes, tmp_path / "folder", tmp_path / "link"):
        assert start(*one, f"script={there}") == 2
        assert f"{there} is there and was not written by this command" in capsys.readouterr().err
    assert start("doctor", "configs/machines/laptop.yaml", f"report={notes}") == 2
    assert start(*one, "script=s3://bucket/job.sh") == 2 and "not to a bucket" in capsys.readouterr().err
    assert notes.read_text() == "mine" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "x\ntouch PWNED\n#"}, "machine.name="),
        ({"name": "../x"}, "machine.name='../x' must be one word"),
        ({"slurm": {"logs": "l\ntouch PWNED"}}, "machine.slurm.logs="),
        ({"slurm": {"partition": "a b --wrap=x"}}, "machine.slurm.partition="),
        ({"slurm": {"account": "--wrap=x"}}, "machine.slurm.account="),
        ({"slurm": {"memory": "1G#x"}}, "machine.slurm.memory="),
        ({"slurm": {"time": "1\u2028#SBATCH"}}, "machine.slurm.time="),
        ({"slurm": {"cpus_per_task": -1}}, "slurm.cpus_per_task=-1"),
        ({"slurm": {"setup": "a\0b"}}, "machine.slurm.setup="),
        ({"env": {"A;touch PWNED;B": "x"}}, "is no variable's name"),
        ({"env": {"A": "\0"}}, "holds control characters"),
        ({"env": {"A": "\udcff"}}, "holds control characters"),
        ({"kubernetes": {"namespace": "a b"}}, "machine.kubernetes.namespace="),
        ({"kubernetes": {"mount": "data"}}, "must be an absolute path"),
        ({"host": "-x", "nodes": 2}, "machine.host='-x'"),
        ({"processes": 10**9}, "processes=1000000000"),
        ({"node_rank": 1}, "machine.node_rank=1 must be"),
        ({"port": 99999999}, "port=99999999"),
        ({"port": 0, "nodes": 2, "host": "a"}, "machine.port=0"),
    ],
)
def test_a_machine_s_settings_are_plain_words(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        build(MachineConfig, given)
    assert str(raised.value).isprintable()


@dataclass(frozen=True)
class Toy(Scheduler):
    """A scheduler is its own file and one line."""

    queue: str = "short"

    def render(self, cluster: Cluster, job: Job) -> str:
        return f"{self.queue} {cluster.nodes} {job.name}: {shlex.join(job.line('0', 'node0'))}\n"


@dataclass(frozen=True)
class ToyMachines(MachineConfig):
    toy: Toy = field(default_factory=Toy)  # the line


def test_a_scheduler_is_its_own_file_and_one_line(words) -> None:
    job = read_launch(["configs/machines/laptop.yaml", *words]).job
    machine = build(ToyMachines, {"kind": "toy", "nodes": "2", "toy": {"queue": "long"}})
    assert machine.render(job).startswith("long 2 worldloom: python -m launch accelerate")
    with pytest.raises(ValueError, match=r"machine.kind=toi must be one of local, slurm, kubernetes, toy"):
        build(ToyMachines, {"kind": "toi"})


def test_a_word_that_is_no_text_is_not_written_into_a_script() -> None:
    with pytest.raises(ValueError, match=r"'out=\\udcff' is no text that a script can hold"):
        shell_line(["python", "out=\udcff"])
