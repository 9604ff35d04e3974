"""The plan: what it counts is what a run holds, and what it advises makes a run fit."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from tiny_recordings import write_recording
from tiny_training import ROOT, launch
from tiny_world import DIT, GAME, write_codec

from configs import build, to_dict
from configs.cli import run as run_words
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from launch.__main__ import VERBS
from launch.plan import estimate, read_plan
from launch.run import read_launch
from model.actions import ActionConfig
from model.config import ActionDiTConfig
from model.flow import FlowMatchConfig
from train.estimate_memory import MemoryEstimate

CLIP = ["height=32", "width=48", "latents=3"]
TINY = {"model": to_dict(replace(DIT, dim=128, ffn_dim=512, num_layers=4)), "flow": {}, "steps": 1}
TINY |= {"objective": {"name": "base"}, "batch": 2, "machine": {"device": "cpu", "processes": 2}}
SETTINGS = [
    f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).split(chr(10))[0]}"
    for name, value in TINY.items()
]


@cache
def estimated(*words: str) -> MemoryEstimate:
    config, rest = read_plan([*SETTINGS, *CLIP, *words])
    return estimate(read_launch(rest), config)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = run_words("launch", VERBS, ["plan", *SETTINGS, *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_two_ranks_of_zero_3_hold_half_of_the_optimizers_states_each() -> None:
    whole, half = estimated("engine.name=ddp"), estimated("engine.stage=3")
    states = whole.bytes["optimizer's states"]
    assert states == pytest.approx(2 * 4 * whole.parameters, rel=0.01)  # two moments in float32
    assert half.bytes["optimizer's states"] == pytest.approx(states / 2, rel=0.02)
    assert half.bytes["average"] == pytest.approx(whole.bytes["average"] / 2, rel=0.02)
    assert half.parameters == whole.parameters


def test_checkpointing_lowers_activations_and_nothing_that_the_model_computes() -> None:
    many = ("engine.name=ddp", "batch=16")
    kept, again = estimated(*many), estimated(*many, "model.checkpoint_every=1")
    assert again.bytes["activations"] < kept.bytes["activations"] / 2
    assert again.flops == kept.flops


def test_a_causal_model_is_estimated_as_often_as_advice_needs_it() -> None:
    causal = ("engine.name=ddp", "objective.name=diffusion_forcing", "model.causal={block: 3, window: 6}", "latents=6")
    one, more = estimated(*causal), estimated(*causal, "batch=16")
    assert more.bytes["activations"] > one.bytes["activations"]


def test_the_work_of_a_step_grows_with_its_clips() -> None:
    one, larger = estimated("engine.name=ddp"), estimated("engine.name=ddp", "batch=16")
    assert larger.tokens == 8 * one.tokens and larger.flops == 8 * one.flops
    assert estimated("engine.name=ddp", "accumulation=3").flops == 3 * one.flops


def test_what_does_not_fit_is_told_the_words_with_which_it_does(capsys) -> None:
    machine = ("engine.name=ddp", "machine.processes=1", "batch=64", *CLIP)
    status, said, _ = planned(capsys, *machine, "memory_gib=64", "mfu=0.5", "peak_tflops=0.01")
    total = float(re.findall(r"^total +([\d.]+)", said, re.M)[0])
    tflops = float(re.findall(r"^TFLOPs per step +([\d.]+)", said, re.M)[0])
    seconds = float(re.findall(r"^s/step +([\d.]+)", said, re.M)[0])
    assert status == 0 and "fits" in said and seconds == pytest.approx(tflops / (0.5 * 0.01), rel=0.01)

    status, said, _ = planned(capsys, *machine, f"memory_gib={total - 0.02:.3f}")
    assert status == 1 and "does not fit" in said
    words = said.strip().splitlines()[-1].rpartition("with ")[2].split()
    assert words[0] == "model.checkpoint_every=1" and "it fits, with" in said


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ((), "give manifest=..., or height= width= latents="),
        (("height=33", "width=48", "latents=3"), "must be multiples of"),
        (("height=96", "width=160", "latents=100000000000"), "beyond what a plan is for"),
        ((*CLIP, "batch=60000", "accumulation=60000"), "beyond what a plan is for"),
        ((*CLIP, "memory_gib=-1"), "memory_gib=-1"),
        ((*CLIP, "mfu=0.5"), "peak_tflops="),
        ((*CLIP, "mfu=2", "peak_tflops=1"), "mfu=2"),
        ((*CLIP, "engine.stag=3"), "did you mean 'engine.stage'"),
        ((*CLIP, "machine.kind=slurm"), "give memory_gib="),
        (("manifest=nowhere.json", "memory_gib=1"), "nowhere.json"),
    ],
)
def test_bad_words_are_one_line(capsys, words: tuple[str, ...], remedy: str) -> None:
    status, said, error = planned(capsys, *words)
    assert status == 2 and remedy in error and error.count("\n") == 1 and said == ""


@dataclass(frozen=True)
class Row:
    """A run whose peak is planned and measured."""

    dim: int
    layers: int
    engine: str
    processes: int


# What is freed goes back to the system at once; glibc and MKL keep some of it otherwise (docs/training.md, Plan).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MALLOC |= {"MKL_DISABLE_FAST_MM": "1"}
TOLERANCE = 0.10  # of the measured peak: states are added up by formulas, not measured
ROWS = [
    Row(dim, layers, engine, processes)
    for dim, layers in ((640, 12), (768, 15), (832, 16))
    for engine, processes in (("engine.name=ddp", 1), ("engine.stage=2", 2), ("engine.stage=3", 2))
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Shards of 96 x 160 px and their codec."""
    folder, game = tmp_path_factory.mktemp("clips"), replace(GAME, height=96, width=160)
    for i in range(6):
        write_recording(folder / "recordings" / f"episode_{i:05d}", game, seed=i)
    write_codec(folder / "codec")
    given = (game, str(folder / "recordings"), str(folder / "codec"), str(folder / "latents"))
    encode(EncodeConfig(*given, shard_clips=2, heldout_every=3))
    return folder


def write_run(row: Row, clips: Path, folder: Path) -> list[str]:
    """The words of a run of two steps."""
    blocks = tuple(range(0, row.layers, 3))
    action = ActionConfig(
        blocks, heads_num=4, hidden_size=64, keyboard_hidden_dim=256, mouse_hidden_dim=256, rope_dim_list=(64, 0, 0)
    )
    size = {"dim": row.dim, "ffn_dim": 4 * row.dim, "num_heads": row.dim // 64, "num_layers": row.layers}
    model = build(ActionDiTConfig, {**size, "vision": "none", "action": to_dict(action)})
    settings = {
        "model": to_dict(model),
        "flow": to_dict(FlowMatchConfig()),
        "manifest": f"{clips}/latents/train/manifest.json",
        "codec": f"{clips}/codec",
        "steps": 2,
        "objective": {"name": "autoregressive", "base_share": 0.0},
        "log_every": 1,
        "batch": 1,
        "out": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return [str(path), row.engine]


# The status of a command, after the peak of resident memory (in KiB) of that of its processes which held most.
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def measured(row: Row, words: list[str]) -> int:
    """Peak of resident memory of the run's process that held most, in bytes."""
    config = ("1gpu" if row.processes == 1 else "cpu_plain") if "ddp" in row.engine else "cpu_zero2"
    command = launch(config, "-m", "train", *words, processes=row.processes)
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.dim}x{row.layers}-{row.engine}")
def test_the_planned_peak_is_the_measured_one(row: Row, clips: Path, tmp_path: Path) -> None:
    words = write_run(row, clips, tmp_path)
    config, rest = read_plan([*words, "machine.device=cpu", f"machine.processes={row.processes}"])
    plan, peak = estimate(read_launch(rest), config), measured(row, words)
    off = plan.total / peak - 1
    print(
        f"\n{plan.parameters / 1e6:.0f} M, {row.engine}, {row.processes} processes: planned "
        f"{plan.total / 2**30:.2f} GiB, measured {peak / 2**30:.2f} GiB, {100 * off:+.0f} %"
    )
    assert abs(off) <= TOLERANCE
