"""The bench: what it counts, what it says, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import SMOKE

from configs import load_config
from configs.cli import run
from model.__main__ import VERBS
from model.cost import count_flops, counted_dit, run_clip, training_flops
from tests.bench.network import BenchConfig, inputs_for, measure_all

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
TINY = [SMOKE, "height=32", "width=48", "repeats=2"]


def flops(config: BenchConfig, train: bool = False) -> int:
    dit = counted_dit(config.model)
    return count_flops(lambda: run_clip(dit, inputs_for(config, config.latents, dit), train))


def test_flops_are_those_of_the_matrices() -> None:
    """One linear layer of the model is known by hand: what a wider feed-forward adds is 2 x 2 x tokens x width."""
    config = load_config(BenchConfig, TINY)
    model = config.model
    wider = replace(config, model=replace(model, ffn_dim=model.ffn_dim + 10))
    tokens = config.latents * (config.height // 16) * (config.width // 16)
    assert flops(wider) - flops(config) == model.num_layers * 2 * 2 * tokens * model.dim * 10
    assert flops(replace(config, batch=2)) == pytest.approx(2 * flops(config), rel=1e-6)


def test_a_backward_pass_costs_about_two_forward_passes_and_recomputing_counts_once() -> None:
    config = load_config(BenchConfig, TINY)
    both = training_flops(config.model, 1, config.latents, config.height // 8, config.width // 8)
    assert both == flops(config, train=True) == pytest.approx(3 * flops(config), rel=0.1)
    recomputing = replace(config.model, checkpoint_every=1)
    assert training_flops(recomputing, 1, config.latents, config.height // 8, config.width // 8) == both


def test_rows_and_environment_go_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*TINY, "codec=patch", "model.causal.window=6", "peak_tflops=0.1", f"out={tmp_path / 'bench.json'}"]
    assert run("model", VERBS, ["bench", *args]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["what"]: row for row in report["rows"]}
    assert list(rows) == [
        "forward", "forward + backward", "cached pass", "encode 9 frames", "decode 9 frames", "decode the next block",
        "stream, 3 + 1 passes",
    ]  # fmt: skip
    for what, row in rows.items():
        assert what in printed
        assert 0 < row["wall_s_min"] <= row["wall_s"] <= row["wall_s_max"] and row["model_tflop"] > 0
        assert row["mfu"] == pytest.approx(row["model_tflop"] / row["wall_s"] / 0.1)
    stream = rows["stream, 3 + 1 passes"]
    assert stream["frames_per_s"] == pytest.approx(12 / stream["wall_s"])
    parts = 4 * rows["cached pass"]["model_tflop"] + rows["decode the next block"]["model_tflop"]
    assert stream["model_tflop"] == pytest.approx(parts)
    assert report["environment"]["torch"] == torch.__version__ and report["config"]["model"]["causal"]["window"] == 6


def test_a_model_that_cannot_stream_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", VERBS, ["bench", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "no cached pass" in printed and "encode" not in printed


def test_bf16_and_a_longer_batched_clip_run() -> None:
    config = load_config(BenchConfig, [*TINY, "dtype=bf16", "batch=2", "blocks=2", "model.causal.window=6"])
    one = {row.what: row for row in measure_all(config)}
    assert one["forward"].model_tflop > 3 * flops(load_config(BenchConfig, TINY)) / 1e12


@pytest.mark.parametrize(
    ("arg", "named"),
    [
        ("batch=0", "batch=0"),
        ("height=40", "multiples of 16"),
        ("dtype=fp8", "must be one of fp32, bf16"),
        ("codec=nowhere", "no codec in nowhere"),
        ("peak_tflops=-1", "peak_tflops=-1.0"),
        ("repeat=3", "did you mean 'repeats'"),
        pytest.param("device=cuda", "device=cuda", marks=WITHOUT_GPU),
    ],
)
def test_a_bench_that_makes_no_sense_is_one_line(arg: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", VERBS, ["bench", *TINY, arg]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error and "\n" not in error
