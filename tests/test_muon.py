"""Muon steps as torch's own does, on whole matrices and on slices of them, and its runs go on as AdamW's do."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from engine_runs import ENGINES, alone_config, compare, cut_off, long, refusal, train
from tiny_training import require_equal_bits
from tiny_world import random_dit
from torch import nn

from train.config import OptimConfig
from train.engine import Engine
from train.optim import MuonAdamW, count_moments, make_optimizer, orthogonalised, rate_factor
from train.state import ParamShard

MUON = ("optim.name=muon", "optim.matrix_learning_rate=2e-3")
CONFIG = OptimConfig(name="muon", learning_rate=1e-2, matrix_learning_rate=3e-3, weight_decay=0.1)
Row = tuple[str, str]  # engine, precision
SOME: list[Row] = [("zero1", "fp32"), ("fsdp2", "fp32"), ("zero3", "bf16")]
ALL: list[Row] = list(itertools.product(ENGINES, ("fp32", "bf16")))


def muon_of(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> MuonAdamW:
    """The optimizer of a model that nothing cuts up."""
    optimizer = make_optimizer(model, CONFIG)
    assert isinstance(optimizer, MuonAdamW)
    shards = [ParamShard(name, 0, p.data.view(-1), p, 0) for name, p in model.named_parameters()]
    optimizer.own(shards, model, torch.empty(0, dtype=dtype), cut=False)
    return optimizer


def test_a_step_is_that_of_torchs_muon_for_matrices_of_blocks_and_of_adamw_for_the_rest() -> None:
    ours, theirs = random_dit(), random_dit()
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2]
    flat = ("blocks.0.modulation", "blocks.0.self_attn.q.bias", "head.head.weight", "time_embedding.0.weight")
    rest = [p for p in named.values() if not any(p is matrix for matrix in matrices)]
    assert len(matrices) == 30 and all(any(named[name] is p for p in rest) for name in flat)
    others = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim in (2, 5)]},
                {"params": [p for p in rest if p.ndim in (1, 3)], "weight_decay": 0.0},  # biases, norms, modulations
            ],
            lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True,
        ),
    ]  # fmt: skip
    optimizer, generator = muon_of(ours), torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
            ours_p.grad = torch.randn(ours_p.shape, generator=generator)
            theirs_p.grad = ours_p.grad.clone()
        for one in (optimizer, *others):
            one.step()
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p), name


def test_its_state_is_one_number_a_weight_of_a_block_and_two_of_the_rest() -> None:
    dit = random_dit()
    optimizer = muon_of(dit)
    for p in dit.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = list(optimizer.state.values())
    numbers = sum(t.numel() for state in held for key, t in state.items() if key != "step")
    assert (
        numbers
        == count_moments(dit, CONFIG)
        < count_moments(dit, OptimConfig())
        == 2 * sum(p.numel() for p in dit.parameters())
    )


def test_both_rates_follow_one_curve(train_args, tmp_path) -> None:
    config = alone_config(train_args, tmp_path, *MUON, "optim.warmup_steps=4")
    engine = Engine.prepare(Accelerator(cpu=True), random_dit(), config)
    engine.scale_learning_rates(rate_factor(config.optim, 0, 20))
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([2.5e-4, 2.5e-4, 5e-4])


@pytest.fixture(scope="module")
def trained(train_args, tmp_path_factory) -> Callable[[Row], Path]:
    """Runs with Muon on two ranks, each trained once."""
    folder = tmp_path_factory.mktemp("muon")

    @cache
    def get(row: Row) -> Path:
        engine, precision = row
        out = folder / "-".join(row).replace(" ", "-")
        train(engine, 2, out, *train_args, *MUON, f"engine.precision={precision}")
        return out

    return get


@pytest.fixture(scope="module")
def muon_plain(train_args, tmp_path_factory) -> Path:
    """One process, float32, one micro-step."""
    out = tmp_path_factory.mktemp("muon_plain")
    train("ddp", 1, out, *train_args, *MUON, accumulation=1)
    return out


@pytest.mark.parametrize("row", [*SOME, *map(long, ALL)], ids=str)
def test_every_engine_steps_as_a_single_process_does(trained, muon_plain, row: Row) -> None:
    print("\n", row, compare(trained(row), muon_plain, row[1]))


def test_in_float32_an_orthogonalised_matrix_has_singular_values_about_1_and_the_same_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((32, 8), (8, 32), (16, 16)):
        left, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))
        right, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator))
        values = torch.logspace(0, -1.5, min(rows, columns))
        core = left.T @ orthogonalised(left @ values.diag() @ right.T) @ right
        assert core.diag().min() > 0.6 and core.diag().max() < 1.25
        torch.testing.assert_close(core, core.diag().diag(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [SOME[0], *map(long, ALL)], ids=str)
def test_a_run_that_goes_on_is_bit_for_bit_the_uninterrupted_one(trained, train_args, tmp_path, row: Row) -> None:
    engine, precision = row
    out = cut_off(trained(row), tmp_path / "run")
    args = *train_args, *MUON, f"engine.precision={precision}"
    assert "at step 3" in train(engine, 2, out, *args)
    require_equal_bits(out, trained(row))


# The engine of two ranks, the one that goes on, and its ranks.
ACROSS = [("zero1", "fsdp2", 1), *map(long, [("fsdp2", "zero2", 1), ("ddp", "zero3", 2), ("zero3", "ddp", 1)])]


@pytest.mark.parametrize("across", ACROSS, ids=str)
def test_a_run_goes_on_as_another_engine_on_other_ranks(
    trained, muon_plain, train_args, tmp_path, across: tuple[str, str, int]
) -> None:
    engine, other, ranks = across
    out = cut_off(trained((engine, "fp32")), tmp_path / "run")
    assert "at step 3" in train(other, ranks, out, *train_args, *MUON, "batch=1")
    compare(out, muon_plain, "fp32")


def test_a_run_with_muon_does_not_go_on_with_adamw(muon_plain, train_args) -> None:
    message = refusal(alone_config(train_args, muon_plain))
    assert "optim.name=muon, not adamw" in message and "init=" in message
