"""Every engine gives what one plain process gives, goes on exactly, and goes on as any other engine on other ranks."""

import itertools
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_runs import (
    ENGINES,
    WEIGHTS,
    compare,
    cut_off,
    long,
    refusal,
    require_equal_files,
    train,
)
from tiny_training import ALONE, ROOT, losses, require_equal_bits, run, saved_weights

from configs import load_config
from configs.errors import UserError
from model.weights import load_weights
from model.world import load_world, newest_checkpoint, read_world_config
from train import engine, loop
from train.config import TrainConfig
from train.engine import Engine
from train.engines import ENGINES as ENGINE_CLASSES
from train.engines import print_engine
from train.validation import Videos

# (engine, precision, accumulation, activation checkpointing, ranks)
Row = tuple[str, str, int, int, int]
SOME: list[Row] = [
    ("zero1", "fp32", 1, 0, 2), ("zero3", "fp32", 2, 1, 2), ("zero3", "bf16", 1, 0, 2),
    ("fsdp2", "fp32", 2, 1, 2), ("fsdp2", "bf16", 2, 0, 2), ("ddp", "fp32", 2, 0, 2),
]  # fmt: skip
ALL: list[Row] = list(itertools.product(ENGINES, ("fp32", "bf16"), (1, 2), (0, 1), (1, 2)))


@pytest.fixture(scope="module")
def trained(train_args, tmp_path_factory) -> Callable[[Row], Path]:
    """Runs of the table, each trained once."""
    folder = tmp_path_factory.mktemp("engines")

    @cache
    def get(row: Row) -> Path:
        engine, _, accumulation, _, ranks = row
        out = folder / "-".join(map(str, row)).replace(" ", "-")
        train(engine, ranks, out, *train_args, *settings_of(row), accumulation=accumulation)
        return out

    return get


def settings_of(row: Row) -> tuple[str, str]:
    return f"engine.precision={row[1]}", f"model.checkpoint_every={row[3]}"


@pytest.mark.parametrize("row", [*SOME, *map(long, ALL)], ids=str)
def test_every_engine_gives_the_single_process_run(trained, plain, row: Row) -> None:
    print("\n", row, compare(trained(row), plain, row[1]))


@pytest.mark.parametrize("row", SOME[1:5], ids=str)
def test_a_run_that_goes_on_is_bit_for_bit_the_uninterrupted_one(trained, train_args, tmp_path, row: Row) -> None:
    engine, _, accumulation, _, ranks = row
    out = cut_off(trained(row), tmp_path / "run")
    # Nor does it matter how the model is built; and videos, for which the averaged weights are put together on rank 0,
    # change nothing.
    args = [
        *train_args, *settings_of(row), "engine.build=sharded", "validation.videos={every: 10, frames: 9, steps: 1}",
        "profile={start: 5, steps: 1, every_rank: true}",
    ]  # fmt: skip
    assert "at step 3" in train(engine, ranks, out, *args, accumulation=accumulation)
    require_equal_bits(out, trained(row))
    assert len(list((out / "profile").iterdir())) == ranks
    if row != SOME[2]:  # DeepSpeed's ZeRO-3 replaces torch's linear by one that rounds otherwise in bf16
        config, checkpoint = load_config(TrainConfig, [*args, *ENGINES[engine][1:], "out=x"]), newest_checkpoint(out)
        videos = Videos(replace(config, out=str(tmp_path / "again")), read_world_config(checkpoint))
        made = videos.make(load_world(checkpoint, precision=config.engine.precision), 20, lambda: None)
        assert len(made) == 2
        assert all(path.read_bytes() == (out / "videos" / path.name).read_bytes() for path in made.values())


@pytest.mark.long
@pytest.mark.parametrize("row", itertools.product(ENGINES, ("fp32", "bf16"), (2,), (0,), (1, 2)), ids=str)
def test_every_engine_goes_on_and_begins_a_branch_bit_for_bit(trained, train_args, tmp_path, row: Row) -> None:
    whole, args = trained(row), (*train_args, *settings_of(row))
    out = cut_off(whole, tmp_path / "run")
    assert "at step 3" in train(row[0], row[-1], out, *args)
    require_equal_bits(out, whole)
    branch = tmp_path / "branch"
    assert "at step 3" in train(row[0], row[-1], branch, *args, f"resume={whole / 'step_0000003'}")
    assert torch.equal(losses(branch), losses(whole)[3:])
    require_equal_files(branch, whole, *WEIGHTS)


@pytest.mark.parametrize(("engine", "precision"), [("zero3", "bf16"), ("fsdp2", "fp32")])
def test_a_model_that_is_built_part_by_part_starts_as_one_that_is_built_whole(
    train_args, tmp_path, engine: str, precision: str
) -> None:
    args = *train_args, "engine.build=sharded", f"engine.precision={precision}"
    program = ("tests/build_by_parts.py",)
    assert "equal" in train(engine, 2, tmp_path, *args, program=program, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize(
    ("row", "engine", "ranks"),
    [(SOME[1], "zero2", 1), (SOME[3], "zero3", 2), (SOME[5], "fsdp2", 1)],
    ids=str,
)
def test_a_run_goes_on_as_another_engine_on_other_ranks(
    trained, plain, train_args, tmp_path, row: Row, engine: str, ranks: int
) -> None:
    out = cut_off(trained(row), tmp_path / "run")
    printed = train(engine, ranks, out, *train_args, "batch=1")  # after a preemption: the resume finds the batch
    assert "at step 3" in printed and ("on 1 ranks the same clips per step" in printed) == (ranks == 1)
    compare(out, plain, "fp32")


ACROSS = [("zero1", "zero3"), ("zero2", "zero3"), ("zero3", "zero2"), ("zero2", "fsdp2"), ("fsdp2", "zero2")]
ACROSS += [("zero3", "fsdp2"), ("fsdp2", "zero3"), ("zero2 offload", "zero3 offload"), ("ddp", "fsdp2")]


@pytest.mark.long
@pytest.mark.parametrize(("engine", "other"), [*zip(ENGINES, ENGINES, strict=True), *ACROSS])
def test_a_run_goes_from_two_ranks_to_one_and_back(trained, plain, train_args, tmp_path, engine, other) -> None:
    alone = cut_off(trained((engine, "fp32", 2, 0, 2)), tmp_path / "alone")
    assert "at step 3" in train(other, 1, alone, *train_args, "batch=1")
    back = cut_off(alone, tmp_path / "back", step=12)
    assert "at step 12" in train(engine, 2, back, *train_args, "batch=1")
    print(f"\n {engine} on 2 -> {other} on 1 -> {engine} on 2 ranks: {compare(back, plain, 'fp32')}")


def test_consolidate_puts_the_parts_of_all_ranks_together(trained, tmp_path) -> None:
    for row, weights in ((SOME[1], "model"), (SOME[3], "ema")):
        done = run([*ALONE, "consolidate", str(trained(row)), f"out={tmp_path / weights}", f"weights={weights}"])
        assert done.returncode == 0 and "written by 2 ranks" in done.stdout, done.stderr
        ours, theirs = load_weights(tmp_path / weights / "model.safetensors"), saved_weights(trained(row), weights)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_state_file_that_is_missing_is_named(trained, tmp_path) -> None:
    out = cut_off(trained(SOME[1]), tmp_path / "run")
    (newest_checkpoint(out) / "trainer" / "rank_00001.safetensors").unlink()
    done = run([*ALONE, "consolidate", str(out), f"out={tmp_path / 'world'}"])
    assert done.returncode == 2 and "rank_00001.safetensors" in done.stderr
    assert not (tmp_path / "world").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["engine.offload=all", "engine.name=ddp"], ["engine.offload=all", "engine.stage=2"],
        ["engine.offload=optimizer", "engine.name=fsdp2"], ["engine.build=sharded", "engine.name=ddp"],
        ["engine.build=sharded", "engine.stage=2"], ["engine.name=fsdp3"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_engine_or_an_option_that_it_has_not_is_refused_before_anything_starts(
    train_args, tmp_path, args: list[str]
) -> None:
    assert args[0] in refusal(load_config(TrainConfig, [*train_args, f"out={tmp_path / 'run'}", *args]))
    assert not (tmp_path / "run").exists()


def test_what_an_engine_is_told_can_be_seen_before_it_starts(train_args, capsys) -> None:
    args = [*train_args, "out=x", "engine.stage=3", "engine.offload=all", "optim.clip_norm=0.25"]
    print_engine(load_config(TrainConfig, args))
    settings = json.loads(capsys.readouterr().out)["accelerate"]["deepspeed_plugin"]
    assert settings["gradient_clipping"] == 0.25 and settings["zero_optimization"]["offload_param"]["device"] == "cpu"


class Toy(Engine):
    """One that counts its backward passes."""

    backwards = 0

    def backward(self, loss: torch.Tensor, apply: bool = True) -> bool:
        Toy.backwards += 1
        return super().backward(loss, apply)


def test_an_engine_is_a_class_and_a_line(train_args, own_signals, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ENGINE_CLASSES, "toy", Toy)
    args = [*train_args, "engine.name=toy", "batch=2", "steps=2", f"out={tmp_path}"]
    assert not loop.train(load_config(TrainConfig, args))
    assert newest_checkpoint(tmp_path).name == "step_0000002" and Toy.backwards == 2


class Bomb:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, ("exploded", "w")


def test_ranks_tell_each_other_small_json_and_never_open_a_pickle(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert engine.gather_objects(("größe", None)) == [["größe", None]]
        with pytest.raises(UserError, match="1048578 bytes"):
            engine.gather_objects("x" * engine.OBJECT_BYTES)
        pickled = pickle.dumps(Bomb(), protocol=0)
        monkeypatch.setattr(engine.json, "dumps", lambda _: pickled.decode())  # what a peer could send
        with pytest.raises(UserError, match="rank 0 sends"):
            engine.gather_objects("")
        assert not Path("exploded").exists()
        pickle.loads(pickled).close()
        assert Path("exploded").exists()
    finally:
        dist.destroy_process_group()
