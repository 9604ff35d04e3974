"""Every engine gives what one plain process gives, goes on exactly, and goes on as any other engine on other ranks."""

import fcntl
import itertools
import json
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_shards import edit
from tiny_training import ALONE, ROOT, STEPS, launch, losses, read_metrics, require_equal_bits, run, saved_weights
from tiny_world import write_checkpoint

from configs import load_config
from configs.errors import UserError
from data_pipeline.order import Order
from model.weights import load_weights, save_weights
from model.world import complete_steps, load_world, newest_checkpoint, read_world_config
from train import check, engine, loop
from train.check import agree, check_run
from train.checkpoint import Position, fit_to_ranks
from train.config import CheckpointConfig, TrainConfig
from train.engine import Engine
from train.engines import ENGINES as ENGINE_CLASSES
from train.engines import print_engine
from train.log import Log
from train.objectives import make_objective
from train.objectives.objective import rng_for_step
from train.save import remove_superseded
from train.state import SavedState
from train.validation import Videos

ENGINES = {
    "zero1": ("cpu_zero2", "engine.stage=1"),
    "zero2": ("cpu_zero2", "engine.stage=2"),
    "zero3": ("cpu_zero2", "engine.stage=3"),
    "zero2 offload": ("cpu_zero2", "engine.stage=2", "engine.offload=optimizer"),
    "zero3 offload": ("cpu_zero2", "engine.stage=3", "engine.offload=all"),
    "fsdp2": ("cpu_plain", "engine.name=fsdp2"),
    "ddp": ("cpu_plain", "engine.name=ddp"),
}
CLIPS = 4  # of one step, on all ranks together
SETTINGS = (
    "steps=20", "optim.learning_rate=1e-3", "checkpoint.every=3", "checkpoint.keep_last=9", "validation.every=100",
)  # fmt: skip

# (engine, precision, accumulation, activation checkpointing, ranks)
Row = tuple[str, str, int, int, int]
MODULE, SPOILED = ("-m", "train"), ("tests/spoil_one_rank.py",)
WEIGHTS = ("model.safetensors", "ema.safetensors")
SOME: list[Row] = [
    ("zero1", "fp32", 1, 0, 2), ("zero3", "fp32", 2, 1, 2), ("zero3", "bf16", 1, 0, 2),
    ("fsdp2", "fp32", 2, 1, 2), ("fsdp2", "bf16", 2, 0, 2), ("ddp", "fp32", 2, 0, 2),
]  # fmt: skip
ALL: list[Row] = list(itertools.product(ENGINES, ("fp32", "bf16"), (1, 2), (0, 1), (1, 2)))


def long(row: tuple) -> Any:
    return pytest.param(row, marks=pytest.mark.long)


def train(
    engine: str, ranks: int, out: Path, *args: str, accumulation: int = 2, program: tuple[str, ...] = MODULE, **env: str
) -> str:
    """Trains with an engine on so many ranks, always with the same clips per step, and returns what was printed."""
    config, *settings = ENGINES[engine]
    by_itself = ranks == 1 and config == "cpu_plain"
    start = [sys.executable, *program] if by_itself else launch(config, *program, processes=ranks)
    files = [arg for arg in args if "=" not in arg]  # their settings count less than those of the table
    settings += [f"batch={CLIPS // ranks // accumulation}", f"accumulation={accumulation}", *SETTINGS]
    done = run([*start, *files, *settings, f"out={out}", *(arg for arg in args if "=" in arg)], **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain(train_args, tmp_path_factory) -> Path:
    """One process, float32, one micro-step."""
    out = tmp_path_factory.mktemp("plain")
    train("ddp", 1, out, *train_args, accumulation=1)
    return out


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


def compare(out: Path, plain: Path, precision: str) -> dict[str, str]:
    """Largest differences of losses, gradient norms and weights; asserts that they are rounding."""
    ours, theirs = losses(out), losses(plain)
    assert (theirs[:, 1] > 0.05).all(), "every step must exceed the clip norm, or the test says nothing about clipping"
    loss, norm = (ours - theirs).abs().amax(dim=0).tolist()
    differences: dict[str, float] = {"loss": loss, "grad_norm": norm}
    for name in ("model", "ema"):
        mine, plains = saved_weights(out, name), saved_weights(plain, name)
        assert mine.keys() == plains.keys()
        differences[name] = max((mine[key] - plains[key]).abs().max().item() for key in mine)
    # Adam turns the rounding of near-zero gradients into a part of a step of 1e-3. A run that does not clip is off by
    # 2.2e-4 in the loss.
    limits = {"fp32": (2e-6, 2e-6, 2e-5, 2e-5), "bf16": (1.5e-4, 1e-3, 1e-2, 1e-2)}[precision]
    assert all(value <= limit for value, limit in zip(differences.values(), limits, strict=True)), differences
    return {name: f"{value:.1e}" for name, value in differences.items()}


@pytest.mark.parametrize("row", [*SOME, *map(long, ALL)], ids=str)
def test_every_engine_gives_the_single_process_run(trained, plain, row: Row) -> None:
    print("\n", row, compare(trained(row), plain, row[1]))


def cut_off(out: Path, to: Path, step: int = 3) -> Path:
    """A copy of a run as it was right after its checkpoint of `step`."""
    shutil.copytree(out, to)
    for name in complete_steps(to):
        if name != f"step_{step:07d}":
            shutil.rmtree(to / name)
    return to


def require_equal_files(out: Path, whole: Path, *names: str) -> None:
    for name in names:
        assert (newest_checkpoint(out) / name).read_bytes() == (newest_checkpoint(whole) / name).read_bytes(), name


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


def alone_config(train_args: list[str], out: Path, *args: str) -> TrainConfig:
    """A run of one process, as `plain`."""
    return load_config(TrainConfig, [*train_args, "engine.name=ddp", f"batch={CLIPS}", *SETTINGS, f"out={out}", *args])


def refusal(config: TrainConfig) -> str:
    """The one line in which a run is refused before it starts."""
    with pytest.raises((UserError, OSError)) as error:
        check_run(config, ranks=1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_a_branch_is_bit_for_bit_the_run_that_was_stopped_there_and_leaves_it_as_it_was(
    plain, train_args, tmp_path
) -> None:
    branch, origin = tmp_path / "branch", f"resume={plain}/step_0000003"
    assert "at step 3" in train("ddp", 1, branch, *train_args, origin, accumulation=1)
    assert torch.equal(losses(branch), losses(plain)[3:])
    require_equal_files(branch, plain, *WEIGHTS, "trainer/rank_00000.safetensors")
    newest = max(path.stat().st_mtime_ns for path in plain.rglob("*"))
    assert newest < (branch / "metrics.jsonl").stat().st_mtime_ns
    out = cut_off(branch, tmp_path / "preempted", step=6)
    asked = alone_config(train_args, out, origin)
    assert check_run(asked, ranks=1).resumed == f"{out}/step_0000006"
    shutil.copytree(plain / "step_0000003", tmp_path / "gone")  # the origin itself is not needed any more
    assert "no branch of resume=" in refusal(replace(asked, resume=str(tmp_path / "gone")))


BRANCH = "resume=ORIGIN/step_0000003"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["out=ORIGIN", "seed=1"], "seed=0"),
        (["out=ORIGIN", "loader.shuffle_shards=2"], "loader.shuffle_shards"),
        (["out=ORIGIN", "batch=3"], "clips per step"),
        (["out=ORIGIN", "model.ffn_dim=32"], "model.ffn_dim=64, not 32"),
        ([BRANCH, "model.ffn_dim=32"], "model.ffn_dim=64, not 32"),
        ([BRANCH, "seed=1"], "seed=0"),
        ([BRANCH, "steps=3"], "has 3 steps done"),
        ([BRANCH, "out=ORIGIN"], "no branch of resume="),
        (["resume=ORIGIN/step_0000004"], "no checkpoint ORIGIN/step_0000004"),
        (["resume=ORIGIN"], "such as ORIGIN/step_0000020"),
        (["resume=step_0000003"], "no checkpoint step_0000003"),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_line_and_stays_as_it_is(
    plain, train_args, tmp_path, args: list[str], message: str
) -> None:
    before = sorted(plain.rglob("*"))
    args, message = [arg.replace("ORIGIN", str(plain)) for arg in args], message.replace("ORIGIN", str(plain))
    assert message in refusal(alone_config(train_args, tmp_path / "new", *args))
    assert not (tmp_path / "new").exists() and sorted(plain.rglob("*")) == before


@pytest.mark.parametrize(("number", "remedy"), [(99, "use a newer one"), (0, "init=")])
def test_a_checkpoint_of_another_format_is_refused(plain, train_args, tmp_path, number: int, remedy: str) -> None:
    out = cut_off(plain, tmp_path / "run")
    edit(newest_checkpoint(out) / "COMPLETE", lambda complete: complete.update(format=number))
    message = refusal(alone_config(train_args, out))
    assert f"format {number}" in message and remedy in message


def test_a_run_folder_in_use_is_refused_on_all_ranks_at_once(train_args, tmp_path) -> None:
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began = time.monotonic()
        args = *train_args, "engine.name=fsdp2", "batch=1", f"out={tmp_path}"
        done = run(launch("cpu_plain", *MODULE, *args))
    assert done.returncode == 1 and done.stderr.count("is in use by the run of") == 1, done.stderr
    assert "gloo" not in done.stderr and time.monotonic() - began < 60  # else the launcher kills after 30 s of waiting


def test_a_checkpoint_that_is_seen_only_when_the_folder_is_held_is_gone_on_with(plain, train_args, tmp_path) -> None:
    out = cut_off(plain, tmp_path / "run")
    asked = alone_config(train_args, out)
    before = check_run(asked, ranks=1)
    assert before.start == 3 and agree(asked, before, ranks=1) is before
    newest = newest_checkpoint(plain)
    shutil.copytree(newest, out / newest.name)
    after = agree(asked, before, ranks=1)
    assert after.resumed == str(out / newest.name) and after.start == int(newest.name[-7:]) > 3


def test_ranks_that_see_other_checkpoints_do_not_start(plain, train_args, monkeypatch) -> None:
    asked = alone_config(train_args, plain)
    monkeypatch.setattr(check, "SEEN_S", 1)
    monkeypatch.setattr(check, "gather_objects", lambda own: [own, (None, None)])
    with pytest.raises(ValueError, match=r"differs between nodes \(rank 0: .*step_0000\d+, rank 1: none\)"):
        agree(asked, check_run(asked, ranks=1), ranks=1)


@pytest.mark.parametrize(
    "setting",
    [
        "optim.clip_norm=0", "optim.warmup_steps=-1", "engine.timeout_s=0", "engine.timeout_s=1e300", "seed=-1",
        f"seed={2**70}", "steps=0", "steps=10000000", "batch=0", "batch=1000000000", "accumulation=-1", "workers=-1",
        "accumulation=1000000000", "log_every=0", "optim.learning_rate=-1e-3", "optim.learning_rate=1e300",
        "optim.weight_decay=-1", "optim.weight_decay=1e300", "optim.betas=[1.5,0.9]", "ema_decay=1", "flow.shift=0",
        "flow.shift=-5", "flow.shift=1e300", "flow.train_steps=1000000000", "checkpoint.every=0", "validation.every=0",
        "checkpoint.keep_last=0", "checkpoint.keep_every=-1", "validation.clips=1000000000000", "profile.steps=-1",
        "validation.videos.frames=1000000000", "validation.videos.seed=-1", "validation.videos.prompts=0",
        "peak_tflops=-1", "objective.base_share=2", "objective.curriculum=-1", "objective.context_noise=1e300",
        "objective.name=[base]", "objective.name=null", "engine.stage=0", "loader.shuffle_shards=-1",
    ],
)  # fmt: skip
def test_a_setting_that_would_do_something_else_is_refused_by_its_name(train_args, tmp_path, setting: str) -> None:
    name = setting.partition("=")[0].removeprefix("optim.").removeprefix("flow.")
    with pytest.raises(UserError, match=rf"{name}\b") as refused:
        make_objective(load_config(TrainConfig, [*train_args, f"out={tmp_path}", setting]).objective)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_an_out_that_cannot_become_a_run_folder_is_one_line_before_any_work(train_args, tmp_path) -> None:
    def message(out: object, *args: str) -> str:
        return refusal(alone_config(train_args, Path(str(out)), *args))

    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is a file" in message(f"{tmp_path}/file")
    assert f"{tmp_path}/file is a file" in message(f"{tmp_path}/file/run/a")
    shards = Path(alone_config(train_args, tmp_path).sources[0].path).parent
    assert "manifest=" in message(f"{shards}/run") and "manifest=" in message(f"{shards}/../{shards.name}")
    step = write_checkpoint(tmp_path / "run")
    for init in (step, tmp_path / "run"):
        assert "init=" in message(f"{step}/x", f"init={init}")
    shutil.rmtree(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_largest_seed_trains(train_args, tmp_path) -> None:
    seed = load_config(TrainConfig, [*train_args, f"out={tmp_path}", f"seed={2**63 - 1}"]).seed
    assert len(rng_for_step(seed, 9_999_999, 2**50, 2).samples) == 2
    assert sorted(Order([[2, 2]], [1.0], seed, 1).clip(i) for i in range(4)) == [0, 1, 2, 3]


def test_the_average_is_that_of_the_weights_of_all_steps(train_args, tmp_path) -> None:
    args = "steps=12", "checkpoint.every=1", "checkpoint.keep_last=12", "ema_decay=0.5", "optim.learning_rate=1e-2"
    train("ddp", 1, tmp_path, *train_args, *args, accumulation=1)
    steps = [tmp_path / f"step_{step:07d}" for step in range(1, 13)]
    weights = [load_weights(step / "model.safetensors") for step in steps]
    averages = [load_weights(step / "ema.safetensors") for step in steps]
    for number in range(1, 12):
        decay = min(0.5, (1 + number) / (10 + number))  # 0.18 ... 0.5 after step 8
        for name, now in averages[number].items():
            expected = decay * averages[number - 1][name] + (1 - decay) * weights[number][name]
            torch.testing.assert_close(now, expected, rtol=0, atol=1e-6)
    assert max((averages[-1][name] - weights[-1][name]).abs().max().item() for name in weights[-1]) > 1e-3


@pytest.mark.parametrize("damage", ["COMPLETE", "world.yaml", "config.yaml", "model.safetensors"])
def test_a_checkpoint_with_a_cut_file_is_named_and_not_gone_on_with(plain, train_args, tmp_path, damage) -> None:
    out = cut_off(plain, tmp_path / "run")
    path = newest_checkpoint(out) / damage
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    assert str(path) in refusal(alone_config(train_args, out))
    assert str(path) in refusal(alone_config(train_args, tmp_path / "new", f"init={newest_checkpoint(out)}"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("COMPLETE", '{"format": 1e999}'), ("COMPLETE", '{"format": [1]}'), ("COMPLETE", "[]"), ("COMPLETE", "\xff"),
        ("COMPLETE", '{"format": 1, "bytes": 3}'), ("COMPLETE", "[" * 200_000), ("COMPLETE", '{"format": "x"}'),
        ("trainer/position.json", "{}"), ("trainer/position.json", "[]"), ("trainer/position.json", "3"),
        *(("trainer/position.json", json.dumps({**asdict(Position(3, 1, 4, 1, 0, "0" * 16)), key: value}))
          for key, value in (("step", "x"), ("step", -1), ("step", 1.5), ("step", None), ("ranks", 0), ("batch", -4),
                             ("manifest", []), ("later", 1))),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_checkpoint_is_one_line_that_names_it(
    plain, train_args, tmp_path, name: str, text: str
) -> None:
    out = cut_off(plain, tmp_path / "run")
    path = newest_checkpoint(out) / name
    path.write_bytes(text.encode("latin-1"))
    if name != "COMPLETE":  # whose sizes agree
        edit(newest_checkpoint(out) / "COMPLETE", lambda complete: complete["bytes"].update({name: len(text)}))
    assert str(path) in refusal(alone_config(train_args, out))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("starts", "[]"), ("starts", "{}"), ("starts", '{"a": -1}'), ("starts", '{"a": "0"}'), ("starts", "{"),
        ("step", "x"), ("step", "9" * 5000), ("crc32", "[]"), ("crc32", "{"),
    ],
)  # fmt: skip
def test_a_ranks_file_whose_description_is_damaged_is_named(tmp_path, key: str, value: str) -> None:
    good = {"starts": '{"a": 0}', "step": "3", "crc32": "{}"}
    save_weights({"weight/a": torch.arange(4.0)}, tmp_path / "good.safetensors", good)
    assert SavedState([tmp_path / "good.safetensors"]).read("weight", "a", 1, 2).tolist() == [1, 2]
    path = tmp_path / "rank_00000.safetensors"
    save_weights({"weight/a": torch.arange(4.0)}, path, {**good, key: value})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        SavedState([path])


def test_parts_of_ranks_that_overlap_are_no_state(tmp_path) -> None:
    paths = [tmp_path / f"rank_0000{rank}.safetensors" for rank in (0, 1)]
    for path, start in zip(paths, (0, 1), strict=True):
        save_weights({"weight/a": torch.arange(2.0)}, path, {"starts": json.dumps({"a": start}), "step": "3"})
    with pytest.raises(ValueError, match="holds 2 of 4 numbers of weight/a"):
        SavedState(paths).read("weight", "a", 0, 4)


def test_lines_of_figures_that_are_damaged_do_not_stop_a_run_that_goes_on(train_args, tmp_path) -> None:
    whole = ['{"step": 1, "loss": 0.5}', '{"step": 3, "loss": NaN}']
    damaged = ["[]", "{}", '{"step": "x"}', "[" * 200_000, "\x00\xff"]
    lines = [whole[0], *damaged, whole[1], '{"step": 4}', '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    log = Log(load_config(TrainConfig, [*train_args, f"out={tmp_path}"]), start=3, main=True)
    log.write(4, {"loss": 0.25})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [*whole, '{"step": 4, "loss": 0.25}']


def test_other_ranks_share_the_same_clips_per_step(train_args, tmp_path) -> None:
    position = Position(5, ranks=2, batch=2, accumulation=3, seed=0, manifest="x")
    config = load_config(TrainConfig, [*train_args, "out=x", "batch=2", "accumulation=3"])
    fitted = {ranks: fit_to_ranks(config, position, ranks, tmp_path) for ranks in (1, 2, 3, 4, 6, 12)}
    assert {ranks: (config.batch, config.accumulation) for ranks, config in fitted.items()} == {
        1: (2, 6), 2: (2, 3), 3: (2, 2), 4: (1, 3), 6: (2, 1), 12: (1, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match="is not; use the same"):
        fit_to_ranks(config, position, 5, tmp_path)


def test_retention_deletes_checkpoints_of_the_run_and_nothing_behind_a_link(tmp_path, monkeypatch, capfd) -> None:
    run_folder, elsewhere = tmp_path / "run", tmp_path / "precious"
    steps = [run_folder / f"step_{step:07d}" for step in (1, 3, 4, 5, 6)]
    for folder in (*steps, elsewhere, run_folder / "step_notes"):
        (folder / "trainer").mkdir(parents=True)
        (folder / "COMPLETE").touch()
    (run_folder / "step_0000003" / "trainer" / "more").symlink_to(elsewhere)
    (run_folder / "step_0000004" / "COMPLETE").unlink()  # of a save that was killed
    (run_folder / "step_0000002").symlink_to(elsewhere)
    (run_folder / "step_0000007").symlink_to(elsewhere)
    (run_folder / "step_best").symlink_to(elsewhere)
    (run_folder / "step_notes" / "COMPLETE").unlink()
    (run_folder / "step_00000009").mkdir()  # no name that a checkpoint gets
    remove_superseded(str(run_folder), CheckpointConfig(keep_last=2, keep_every=5))
    left = sorted(path.name for path in run_folder.iterdir())
    assert left == ["step_00000009", "step_0000005", "step_0000006", "step_0000007", "step_best", "step_notes"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["COMPLETE", "trainer"] and not capfd.readouterr().err
    monkeypatch.setattr(shutil, "rmtree", lambda folder: (_ for _ in ()).throw(PermissionError(13, "denied", folder)))
    remove_superseded(str(run_folder), CheckpointConfig(keep_last=1))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "step_0000005: [Errno 13] denied" in lines[0], lines


@pytest.mark.parametrize(("policy", "status"), [("stop", 1), ("skip", 0)])
def test_a_loss_that_is_nan_on_one_rank_stops_all_or_is_skipped(train_args, tmp_path, policy: str, status: int) -> None:
    args = "engine.name=ddp", "batch=1", "accumulation=2", f"on_nonfinite={policy}", "checkpoint.every=2"
    done = run([*launch("cpu_plain", *SPOILED), *train_args, *args, f"out={tmp_path}"], SPOIL_MICRO="2")
    printed = done.stdout + done.stderr
    assert done.returncode == status, printed[-3000:]
    if policy == "stop":
        fault = next(line for line in printed.splitlines() if "not finite" in line)
        assert "step 3" in fault and "rank 1" in fault and "rank 0" not in fault and "episode_" in fault
        assert newest_checkpoint(tmp_path).name == "step_0000002"
        return
    lines = [line for line in read_metrics(tmp_path) if "skipped_steps" in line]
    assert [line["step"] for line in lines if line["skipped_steps"]] == [4] and len(lines) == STEPS
    assert all(tensor.isfinite().all() for tensor in saved_weights(tmp_path, "model").values())


def train_spoiled(engine: str, ranks: int, out: Path, *args: str, accumulation: int = 2, **env: str) -> None:
    """A run with a NaN in step 3, which it leaves out."""
    args = *args, "steps=8", "on_nonfinite=skip"
    train(engine, ranks, out, *args, accumulation=accumulation, program=SPOILED, PYTHONPATH=str(ROOT), **env)


@pytest.fixture(scope="module")
def skipping(train_args, tmp_path_factory) -> Path:
    """One process, one micro-step, whose step 3 is NaN and left out."""
    out = tmp_path_factory.mktemp("skipping")
    train_spoiled("ddp", 1, out, *train_args, accumulation=1, SPOIL_RANK="0")
    return out


SKIPS: list[Any] = [("zero2", 1, "fp32", 1), ("zero3", 2, "fp32", 1), ("fsdp2", 1, "fp32", 1)]
SKIPS += map(long, itertools.product(ENGINES, (1, 2), ("fp32", "bf16"), (2,)))


@pytest.mark.parametrize("row", SKIPS, ids=str)
def test_a_micro_step_that_is_nan_on_the_last_rank_takes_the_whole_step_with_it_and_nothing_else(
    skipping, train_args, tmp_path, row: tuple[str, int, str, int]
) -> None:
    engine, micro, precision, ranks = row
    args = *train_args, f"engine.precision={precision}"
    train_spoiled(engine, ranks, tmp_path, *args, SPOIL_RANK=str(ranks - 1), SPOIL_MICRO=str(micro))
    lines = [line for line in read_metrics(tmp_path) if "skipped_steps" in line]
    assert [line["step"] for line in lines if line["skipped_steps"]] == [4] and "loss" not in lines[3]
    compare(tmp_path, skipping, precision)


def test_too_little_memory_is_one_line_that_says_what_to_lower(train_args, tmp_path) -> None:
    args = [*train_args, "engine.name=ddp", "batch=2", f"out={tmp_path}"]
    done = run([sys.executable, *SPOILED, *args], SPOIL="memory", PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "lower batch" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert "batch=2" in done.stderr and "Traceback" not in done.stderr


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
