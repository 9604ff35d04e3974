"""The files of docker/: linted, of one mind with each other and with the rest, and their commands are taken."""

import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.specifiers import SpecifierSet
from test_readme import check_command
from tiny_training import ROOT

from launch.doctor import read_doctor
from launch.run import read_launch

DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(path: Path) -> list[tuple[str, str]]:
    """(instruction, value) of a Dockerfile, without comments."""
    file: Any = io.BytesIO(path.read_bytes())  # it reads bytes, and says that it wants str
    structure = DockerfileParser(fileobj=file).structure
    return [(step["instruction"], step["value"]) for step in structure if step["instruction"] != "COMMENT"]


def arguments(path: Path) -> dict[str, str]:
    """The defaults of its ARGs."""
    return dict(value.split("=", 1) for kind, value in steps(path) if kind == "ARG" and "=" in value)


def sources() -> list[str]:
    """What git has, or would have: what an image is built from."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_a_dockerfile(path: Path) -> None:
    done = subprocess.run(["hadolint", "--no-color", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_all_that_a_dockerfile_copies_is_there_and_not_ignored(path: Path) -> None:
    stages = set()
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for kind, value in steps(path):
        if kind == "FROM":
            stages |= {value.split()[-1]}
        if kind == "COPY":
            args = shlex.split(value)
            flags = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--"))
            names = [arg for arg in args if not arg.startswith("--")][:-1]
            assert names and flags.get("from") in {None, *stages}, value
            for name in names if "from" not in flags else ():
                assert (ROOT / name).exists() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), value
        for mount in re.findall(r"--mount=\S*from=(\w+)", value):
            assert mount in stages, value
    assert not [name for name in sources() if name.split("/")[0] in ignored]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_stage_ends_as_root(path: Path) -> None:
    """With a number: Kubernetes' runAsNonRoot can read no name."""
    defaults, users, stage = arguments(path), {}, ""
    for kind, value in steps(path):
        if kind == "FROM":
            base, stage = value.split()[0], value.split()[-1]
            users[stage] = users.get(base, "0")
        if kind == "USER":
            users[stage] = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], value)
    assert users and all(user.isdigit() and int(user) >= 1000 for user in users.values()), users
    assert "UID" not in defaults  # where bash runs the RUN steps, that is a variable of its own


def test_the_images_have_the_versions_of_the_project() -> None:
    cpu, cuda = (dict.fromkeys(value for kind, value in steps(path) if kind == "FROM") for path in DOCKERFILES)
    (base,) = cpu
    python = re.fullmatch(r"python:(\d+\.\d+)-bookworm", base)
    assert python and python[1] in SpecifierSet(PROJECT["requires-python"])
    assert "${CUDA}-devel" in "".join(cuda) and "${CUDA}-base" in "".join(cuda)
    torch = "".join(value for path in DOCKERFILES for kind, value in steps(path) if kind == "RUN")
    assert torch.count("grep '^torch==' constraints.txt") == 2 and "pip install torch" not in torch
    (flash,) = PROJECT["optional-dependencies"]["flash"]
    wanted = SpecifierSet(re.split(r"[;]", flash)[0].removeprefix("flash-attn").strip())
    assert arguments(ROOT / "docker" / "Dockerfile.cuda")["FLASH_ATTN"] in wanted


def test_compose_is_valid_by_the_specification() -> None:
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, str(COMPOSE)], capture_output=True).returncode == 0


def test_the_parts_of_compose_fit_each_other() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in {"runs", "s3"} or (COMPOSE.parent / source).is_file(), volume
    (identity,) = json.loads((COMPOSE.parent / "s3.json").read_text())["identities"]
    (secret,) = identity["credentials"]
    server = dict(re.findall(r"-(s3\.port|ip)=(\S+)", SERVICES["s3"]["command"]))
    for service in OURS.values():
        env = service["environment"]
        assert secret == {"accessKey": env["AWS_ACCESS_KEY_ID"], "secretKey": env["AWS_SECRET_ACCESS_KEY"]}
        assert env["AWS_ENDPOINT_URL_S3"] == f"http://s3:{server['s3.port']}" and server["ip"] == "s3"
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", [name for name in OURS if name != "data"])
def test_a_node_of_compose_runs_a_command_that_is_taken(name: str, monkeypatch) -> None:
    service = OURS[name]
    monkeypatch.chdir(ROOT)
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    program, args = service["command"][:3], service["command"][3:]
    assert program == ["python", "-m", "launch"]
    machine = read_doctor(args[1:]).machine if args[0] == "doctor" else read_launch(args).machine
    assert (machine.kind, machine.nodes, machine.node_rank) == ("local", 2, int(name[-1]))
    assert service["hostname"] == f"node{name[-1]}" and machine.host == "node0"


def test_the_data_of_compose_is_made_by_commands_that_are_taken(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "python").write_text(
        f'#!/bin/bash\nprintf "%q " python "$@" >> {tmp_path}/calls\necho >> {tmp_path}/calls\n'
    )
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program, script, bucket = OURS["data"]["command"]
    subprocess.run([program, script, bucket], check=True, env=env, stdin=subprocess.DEVNULL)
    first, *commands = (tmp_path / "calls").read_text().splitlines()
    assert shlex.split(first) == ["python", "-", bucket] and len(commands) == 3
    for command in commands:
        check_command(command.strip())
    made = shlex.split(commands[-1])[-1].removeprefix("out=")
    nodes = [arg for name in ("node0", "node1") for arg in OURS[name]["command"] if arg.startswith("manifest=")]
    assert nodes == 2 * [f"manifest={made}/train/manifest.json"]
    assert subprocess.run(["shellcheck", script]).returncode == 0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_run_steps_of_the_cpu_image_that_need_no_root_run_in_a_clean_folder(tmp_path) -> None:
    """As a builder would: a copy of the sources, nothing of this environment. TORCH_INDEX= takes pip's own index."""
    home, unprivileged, ran = tmp_path / "worldloom", False, 0
    home.mkdir()
    ours = ("VIRTUAL_ENV", "PYTHON", "TORCH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env["PATH"] = os.pathsep.join(path for path in env["PATH"].split(os.pathsep) if not path.startswith(str(ROOT)))
    python = shutil.which("python3", path=env["PATH"])
    assert python and python != sys.executable
    for kind, value in steps(ROOT / "docker" / "Dockerfile.cpu"):
        unprivileged |= kind == "USER"
        if kind == "ENV":
            text = value.replace("/worldloom", str(home)).replace("$PATH", env["PATH"])
            env |= dict(pair.split("=", 1) for pair in shlex.split(text))
        elif kind == "COPY":
            *names, _ = [arg for arg in shlex.split(value) if not arg.startswith("--")]
            for name in sources() if names == ["."] else names:
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, home / name)
        elif kind == "RUN" and unprivileged:
            print(f"\n{value}", flush=True)
            subprocess.run(["sh", "-c", value], cwd=home, env={**env, "TORCH_INDEX": ""}, check=True)
            ran += 1
    assert ran == 2 and (home / ".venv" / ".ready").is_file()
    usage = subprocess.run(["python", "-m", "launch", "help"], cwd=home, env=env, capture_output=True, text=True)
    assert usage.returncode == 0 and "doctor" in usage.stdout, usage.stderr
    where = ["python", "-c", "import launch, torch; print(launch.__file__, torch.__version__)"]
    output = subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert pinned and output.startswith(str(home)) and output.split()[-1].split("+")[0] == pinned[1]
