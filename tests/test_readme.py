"""Every command of the README and of the pipelines parses, and every YAML loads."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from configs import load_config
from data_pipeline.__main__ import VERBS as DATA_VERBS
from data_pipeline.commands import VerifyConfig
from data_pipeline.doctor.examine import DoctorConfig
from data_pipeline.inspect import InspectConfig
from data_pipeline.plan import EncodeConfig
from data_pipeline.record import RecordConfig
from launch.__main__ import VERBS as LAUNCH_VERBS
from launch.doctor import read_doctor
from launch.pipeline import PipelineConfig
from launch.plan import read_plan
from launch.run import read_launch
from model.__main__ import VERBS as MODEL_VERBS
from model.config import ModelConfig
from model.convert import ExportConfig, ImportConfig
from sampling.__main__ import VERBS as SAMPLING_VERBS
from sampling.evaluate import EvaluateConfig
from sampling.generate import GenerateConfig
from tests.bench.loader import BenchConfig as LoadBenchConfig
from tests.bench.network import BenchConfig
from train.__main__ import VERBS as TRAIN_VERBS
from train.checkpoint import ConsolidateConfig
from train.codec import CodecTrainConfig
from train.config import TrainConfig
from train.objectives import make_objective

ROOT = Path(__file__).parent.parent
VERBS = {
    "data_pipeline": DATA_VERBS, "launch": LAUNCH_VERBS, "model": MODEL_VERBS, "sampling": SAMPLING_VERBS,
    "train": TRAIN_VERBS,
}  # fmt: skip
CONFIGS = {
    ("data_pipeline", "record"): RecordConfig,
    ("data_pipeline", "encode"): EncodeConfig,
    ("data_pipeline", "bench-encode"): EncodeConfig,
    ("data_pipeline", "repair"): EncodeConfig,
    ("data_pipeline", "doctor"): DoctorConfig,
    ("data_pipeline", "inspect"): InspectConfig,
    ("data_pipeline", "verify"): VerifyConfig,
    ("data_pipeline", "bench"): LoadBenchConfig,
    ("train", "codec"): CodecTrainConfig,
    ("train", "engine"): TrainConfig,
    ("train", "consolidate"): ConsolidateConfig,
    ("sampling", "generate"): GenerateConfig,
    ("sampling", "evaluate"): EvaluateConfig,
    ("model", "info"): ModelConfig,
    ("model", "bench"): BenchConfig,
    ("model", "export"): ExportConfig,
    ("model", "import"): ImportConfig,
    ("launch", "pipeline"): PipelineConfig,
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
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) <= set(targets), command
        return
    if words[:4] == ["python", "-m", "launch", "accelerate"]:  # with the same words
        words = ["accelerate", "launch", *words[4:]]
    if words[0] == "accelerate":
        assert words[:3] == ["accelerate", "launch", "--config_file"], command
        assert yaml.safe_load((ROOT / words[3]).read_text())["distributed_type"] in ("DEEPSPEED", "MULTI_GPU")
        words = ["python", *words[words.index("-m") :]]
    assert words[:2] == ["python", "-m"], command
    program, verb, given = words[2], words[3], words[4:]
    if program == "train" and verb.endswith(".yaml"):
        make_objective(load_config(TrainConfig, [verb, *given]).objective)
        return
    if program == "launch" and verb.startswith("configs/machines/"):
        read_launch([verb, *given])
        return
    if program == "launch" and verb == "doctor":
        read_doctor(given)
        return
    if program == "launch" and verb == "plan":
        read_launch(read_plan(given)[1])
        return
    assert verb in VERBS[program], command
    if program == "sampling" or (program, verb) == ("train", "consolidate") or (program, verb) == ("model", "export"):
        given[0] = f"checkpoint={given[0]}"
    if (program, verb) == ("model", "import"):
        given[0] = f"file={given[0]}"
    if program == "data_pipeline" and verb in ("inspect", "verify", "bench"):
        given[0] = f"manifest={given[0]}"
    if (program, verb) in CONFIGS:
        load_config(CONFIGS[program, verb], given)
    else:
        assert (program, verb) == ("model", "parity"), command


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
        words = "--config_file launch/accelerate/cpu_zero2.yaml -m train configs/train/demo_base.yaml step=4"
        check_command(f"python -m launch accelerate {words}")


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
