"""Every command of the README and of the pipelines parses, and every YAML loads."""

import re
import shlex
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from configs import load_config
from configs.cli import is_setting
from data_pipeline.plan import EncodeConfig
from launch.doctor import read_doctor
from launch.pipeline import PipelineConfig
from launch.plan import read_plan
from launch.run import read_launch
from model.config import ModelConfig
from train.config import TrainConfig
from train.objectives import make_objective

ROOT = Path(__file__).parent.parent
READERS = {  # of commands that take the arguments themselves
    "launch.run:launch": read_launch,
    "launch.doctor:doctor": read_doctor,
    "launch.plan:plan": lambda args: read_launch(read_plan(args)[1]),
    "launch.pipeline:pipeline": partial(load_config, PipelineConfig),
    "train.loop:main": lambda args: make_objective(load_config(TrainConfig, args).objective),
    "tests.parity.run:parity": list,
}
PIPELINES = sorted((ROOT / "configs/pipelines").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def readme_commands() -> list[str]:
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    return [line.strip() for line in lines if re.match(r"    (make|python|accelerate) ", line)]


def pipeline_commands() -> list[str]:
    return [
        stage.command
        for path in PIPELINES
        for stage in load_config(PipelineConfig, [str(path), "precision=fp32"]).stages
    ]


def check_command(command: str) -> None:
    args = shlex.split(command, comments=True)
    if args[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(args[1:]) <= set(targets), command
        return
    if args[:4] == ["python", "-m", "launch", "accelerate"]:  # with the same arguments
        args = ["accelerate", "launch", *args[4:]]
    if args[0] == "accelerate":
        assert args[:3] == ["accelerate", "launch", "--config_file"], command
        assert yaml.safe_load((ROOT / args[3]).read_text())["distributed_type"] in ("DEEPSPEED", "MULTI_GPU")
        args = ["python", *args[args.index("-m") :]]
    assert args[:2] == ["python", "-m"], command
    verbs, args = import_module(f"{args[2]}.__main__").VERBS, args[3:]
    verb = verbs["run"] if is_setting(args[0]) else verbs[args.pop(0)]
    if verb.first:
        args[0] = f"{verb.first}={args[0]}"
    takes = next(iter(get_type_hints(verb.load()).values()))
    if takes == list[str]:
        READERS[verb.function](args)
    else:
        load_config(takes, args)


def test_the_readme_is_short_and_has_commands() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert len(readme_commands()) >= 30


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", *ROOT.glob("docs/*.md")]:
        for target, section in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", page.read_text()):
            file = page.parent / target if target else page
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M) if file.suffix == ".md" else []
            anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert file.exists() and (not section or section in anchors), f"{page.name}: {target}{section}"


@pytest.mark.parametrize("command", [*readme_commands(), *pipeline_commands()])
def test_every_command_parses(command: str) -> None:
    check_command(command)


def test_a_command_that_does_not_parse_is_found() -> None:
    with pytest.raises(ValueError, match="did you mean 'episodes'"):
        check_command("python -m data_pipeline record configs/games/doom.yaml out=x episode=4")
    with pytest.raises(AssertionError):
        check_command("make dance")
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        args = "--config_file launch/accelerate/cpu_zero2.yaml -m train configs/train/demo_base.yaml step=4"
        check_command(f"python -m launch accelerate {args}")


def test_the_processes_of_a_pipeline_meet_where_nobody_else_is_let_in() -> None:
    assert not [command for command in pipeline_commands() if command.startswith("accelerate")]


def test_every_yaml_of_ours_is_used_by_a_test_a_pipeline_or_the_readme() -> None:
    known = {"games": "game:", "machines": "machine:", "models": "model:", "train": "", "pipelines": "stages:"}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        text = path.read_text()
        assert path.parent.name in known and known[path.parent.name] in text, path
        if path.parent.name == "models":
            load_config(ModelConfig, [str(path)])
        if path.parent.name == "games":
            load_config(EncodeConfig, [str(path), "source=x", "codec=x", "out=x"])
        if path.parent.name == "train":
            name = str(path.relative_to(ROOT))
            commands = [*readme_commands(), *pipeline_commands()]
            assert any(name in command for command in commands), f"no pipeline and no command of the README uses {name}"
