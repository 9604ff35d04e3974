"""What a run goes on from, what it refuses to go on from, and which checkpoints stay."""

import fcntl
import json
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from engine_runs import (
    MODULE,
    WEIGHTS,
    alone_config,
    cut_off,
    refusal,
    require_equal_files,
    train,
)
from tiny_shards import edit
from tiny_training import launch, losses, run
from tiny_world import write_checkpoint

from configs import load_config
from configs.errors import UserError
from data_pipeline.order import Order
from model.weights import load_weights, save_weights
from model.world import newest_checkpoint
from train import check
from train.check import agree, check_run
from train.checkpoint import Position, fit_to_ranks
from train.config import CheckpointConfig, TrainConfig
from train.log import Log
from train.objectives import make_objective
from train.objectives.objective import rng_for_step
from train.save import remove_superseded
from train.state import SavedState


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
        (["out=ORIGIN", "optim.name=muon"], "optim.name=adamw, not muon"),
        ([BRANCH, "optim.name=muon"], "optim.name=adamw, not muon"),
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
        "optim.name=lion", "optim.matrix_learning_rate=-1",
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
