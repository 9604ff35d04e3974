"""The plan: what it counts is what a run holds, and what it advises makes a run fit."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tiny_recordings import write_recording
from tiny_training import ROOT, launch
from tiny_world import DIT, GAME, write_codec

from configs import build, to_dict
from configs.cli import run as run_args
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from launch.__main__ import VERBS
from launch.plan import estimate, read_plan
from launch.run import read_launch
from model.actions import ActionConfig
from model.config import ActionDiTConfig
from train.estimate_memory import MemoryEstimate

CLIP = ["height=32", "width=48", "latents=3"]
TINY = {"model": to_dict(replace(DIT, dim=128, ffn_dim=512, num_layers=4)), "flow": {}, "steps": 1}
TINY |= {"objective": {"name": "base"}, "batch": 2, "machine": {"device": "cpu", "processes": 2}}
SETTINGS = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]


@cache
def estimated(*args: str) -> MemoryEstimate:
    config, rest = read_plan([*SETTINGS, *CLIP, *args])
    return estimate(read_launch(rest), config)


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = run_args("launch", VERBS, ["plan", *SETTINGS, *args])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_two_ranks_of_zero_3_hold_half_of_the_optimizers_states_each() -> None:
    whole, half = estimated("engine.name=ddp"), estimated("engine.stage=3")
    states = whole.bytes["optimizer's states"]
    assert states == pytest.approx(2 * 4 * whole.parameters, rel=0.01)  # two moments in float32
    assert half.bytes["optimizer's states"] == pytest.approx(states / 2, rel=0.02)
    assert half.bytes["average"] == pytest.approx(whole.bytes["average"] / 2, rel=0.02)
    assert half.parameters == whole.parameters
    muon = estimated("engine.stage=3", "optim.name=muon").bytes["optimizer's states"]
    assert 0.5 * states < 2 * muon < 0.8 * states  # one moment of the blocks' matrices, which are most weights


def test_checkpointing_lowers_activations_and_nothing_that_the_model_computes() -> None:
    many = ("engine.name=ddp", "batch=16")
    kept, again = estimated(*many), estimated(*many, "model.checkpoint_every=1")
    assert again.bytes["activations"] < kept.bytes["activations"] / 2
    assert again.flops == kept.flops


def test_a_causal_model_is_estimated_as_often_as_advice_needs_it() -> None:
    causal = ("engine.name=ddp", "objective.name=diffusion_forcing", "model.causal={block: 3, window: 6}", "latents=6")
    small, large = estimated(*causal), estimated(*causal, "batch=16")
    assert large.bytes["activations"] > small.bytes["activations"]


def test_the_work_of_a_step_grows_with_its_clips() -> None:
    small, large = estimated("engine.name=ddp"), estimated("engine.name=ddp", "batch=16")
    assert large.tokens == 8 * small.tokens and large.flops == 8 * small.flops
    assert estimated("engine.name=ddp", "accumulation=3").flops == 3 * small.flops


def test_what_does_not_fit_is_told_the_settings_with_which_it_does(capsys) -> None:
    machine = ("engine.name=ddp", "machine.processes=1", "batch=64", *CLIP)
    status, text, _ = planned(capsys, *machine, "memory_gib=64", "mfu=0.5", "peak_tflops=0.01")
    total, tflops, seconds = (
        float(re.findall(rf"^{name} +([\d.]+)", text, re.M)[0]) for name in ("total", "TFLOPs per step", "s/step")
    )
    assert status == 0 and "fits" in text and seconds == pytest.approx(tflops / (0.5 * 0.01), rel=0.01)

    status, text, _ = planned(capsys, *machine, f"memory_gib={total - 0.02:.3f}")
    assert status == 1 and "does not fit" in text
    assert "it fits, with" in text and text.strip().rpartition("with ")[2].startswith("model.checkpoint_every=1")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "height= width= latents="),
        (("height=33", "width=48", "latents=3"), "height=33"),
        (("height=96", "width=160", "latents=100000000000"), "latents="),
        ((*CLIP, "batch=60000", "accumulation=60000"), "batch="),
        ((*CLIP, "memory_gib=-1"), "memory_gib=-1"),
        ((*CLIP, "mfu=0.5"), "peak_tflops="),
        ((*CLIP, "mfu=2", "peak_tflops=1"), "mfu=2"),
        ((*CLIP, "engine.stag=3"), "'engine.stage'"),
        ((*CLIP, "machine.kind=slurm"), "memory_gib="),
        (("manifest=nowhere.json", "memory_gib=1"), "nowhere.json"),
    ],
)
def test_bad_arguments_are_one_line(capsys, args: tuple[str, ...], message: str) -> None:
    status, text, error = planned(capsys, *args)
    assert status == 2 and message in error and error.count("\n") == 1 and text == ""


# A run whose peak is planned and measured: width, layers, engine, processes.
Row = tuple[int, int, str, int]
# What is freed goes back to the system at once; glibc and MKL keep some of it otherwise (docs/training.md, Plan).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MALLOC |= {"MKL_DISABLE_FAST_MM": "1"}
TOLERANCE = 0.10  # of the measured peak: states are added up by formulas, not measured
ENGINES = (("engine.name=ddp", 1), ("engine.stage=2", 2), ("engine.stage=3", 2))
ROWS: list[Row] = [(*size, *engine) for size in ((640, 12), (768, 15), (832, 16)) for engine in ENGINES]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Shards of 96 x 160 px and their codec."""
    folder, game = tmp_path_factory.mktemp("clips"), replace(GAME, height=96, width=160)
    for i in range(6):
        write_recording(folder / "recordings" / f"episode_{i:05d}", game, seed=i)
    write_codec(folder / "codec")
    source, codec, out = (str(folder / name) for name in ("recordings", "codec", "latents"))
    encode(EncodeConfig(game, source, codec, out, shard_clips=2, heldout_every=3))
    return folder


def write_run(row: Row, clips: Path, folder: Path) -> list[str]:
    """The arguments of a run of two steps."""
    dim, layers, engine, _ = row
    action = ActionConfig(
        tuple(range(0, layers, 3)), heads_num=4, hidden_size=64, keyboard_hidden_dim=256, mouse_hidden_dim=256,
        rope_dim_list=(64, 0, 0),
    )  # fmt: skip
    size = {"dim": dim, "ffn_dim": 4 * dim, "num_heads": dim // 64, "num_layers": layers}
    model = build(ActionDiTConfig, {**size, "vision": "none", "action": to_dict(action)})
    settings = {
        **TINY, "model": to_dict(model), "manifest": f"{clips}/latents/train/manifest.json", "codec": f"{clips}/codec",
        "steps": 2, "objective": {"name": "autoregressive", "base_share": 0.0}, "log_every": 1, "batch": 1,
        "out": str(folder / "run"),
    }  # fmt: skip
    del settings["machine"]
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return [str(path), engine]


# The status of a command, after the peak of resident memory (in KiB) of that of its processes which held most.
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def measured(row: Row, args: list[str]) -> int:
    """Peak of resident memory of the run's process that held most, in bytes."""
    _, _, engine, processes = row
    config = ("1gpu" if processes == 1 else "cpu_plain") if "ddp" in engine else "cpu_zero2"
    command = launch(config, "-m", "train", *args, processes=processes)
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    return 1024 * int(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_planned_peak_is_the_measured_one(row: Row, clips: Path, tmp_path: Path) -> None:
    args = write_run(row, clips, tmp_path)
    config, rest = read_plan([*args, "machine.device=cpu", f"machine.processes={row[3]}"])
    plan, peak = estimate(read_launch(rest), config), measured(row, args)
    off = plan.total / peak - 1
    sizes = f"planned {plan.total / 2**30:.2f} GiB, measured {peak / 2**30:.2f} GiB"
    print(f"\n{plan.parameters / 1e6:.0f} M, {row}: {sizes}, {100 * off:+.0f} %")
    assert abs(off) <= TOLERANCE
