"""Training: one process and two under ZeRO-2 agree, a stop costs nothing, and what cannot work is refused."""

import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_recordings import write_recording
from tiny_training import (
    ALONE,
    ROOT,
    launch,
    losses,
    read_metrics,
    run,
    saved_weights,
)
from tiny_world import DIT, GAME, generate
from toy_objective import Toy

from configs import load_config
from configs.errors import UserError, is_users
from configs.game import ActionSpace
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from data_pipeline.types import Batch
from model.action_dit import ActionDiT
from model.flow import FlowMatch, FlowMatchConfig
from model.masks import CausalConfig
from model.world import find_codec, newest_checkpoint, read_world_config
from train.check import check_run
from train.checkpoint import ConsolidateConfig, consolidate
from train.config import OptimConfig, TrainConfig
from train.loop import train
from train.objectives import OBJECTIVES
from train.objectives.autoregressive import Autoregressive
from train.objectives.diffusion_forcing import DiffusionForcing
from train.objectives.objective import Objective, rng_for_step
from train.optim import make_optimizer, rate_factor


@pytest.fixture
def train_here(train_args, own_signals) -> Callable[..., bool]:
    """Trains in this process."""
    return lambda *settings: train(load_config(TrainConfig, [*train_args, "engine.name=ddp", *settings]))


def test_a_run_on_one_process_writes_what_it_promises(alone) -> None:
    folder = newest_checkpoint(alone)
    assert {path.name for path in folder.iterdir()} == {
        "COMPLETE", "config.yaml", "world.yaml", "model.safetensors", "ema.safetensors", "trainer",
    }  # fmt: skip
    lines = read_metrics(alone)
    wanted = {"loss", "grad_norm", "s/step", "clips/s", "data_wait", "learning_rate", "memory_gib", "skipped_steps"}
    assert wanted <= lines[0].keys() and lines[0]["forward_s/slowest_rank"] >= lines[0]["forward_s/fastest_rank"] > 0
    assert any(key.startswith("loss/sigma_") for key in lines[0])
    heldout = [line for line in lines if "heldout/right" in line]
    assert [line["step"] for line in heldout] == [4, 8] and all("heldout/shuffled" in line for line in heldout)
    assert list(alone.glob("wandb/offline-run-*/run-*.wandb"))


def test_zero2_on_two_processes_gives_the_single_process_losses(train_here, train_args, tmp_path) -> None:
    train_here(f"out={tmp_path / 'single'}", "batch=2", "accumulation=2")
    single, zero2 = losses(tmp_path / "single"), tmp_path / "zero2"
    done = run([*launch("cpu_zero2", "-m", "train"), *train_args, f"out={zero2}", "batch=1", "accumulation=2"])
    assert done.returncode == 0, done.stderr
    assert (single[:, 1] > 0.05).all(), "every step must exceed the clip norm, or the test says nothing about clipping"
    # float32 sums in another order; a missing clip changes the losses by 1e-2 and more
    torch.testing.assert_close(losses(zero2), single, atol=5e-5, rtol=5e-4)
    for name in ("model", "ema"):
        ours, theirs = saved_weights(zero2, name), saved_weights(tmp_path / "single", name)
        assert ours.keys() == theirs.keys()
        worst = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
        assert worst < 2e-3, (name, worst)  # Adam turns rounding of near-zero gradients into a part of a step of 1e-2


def test_a_finished_run_started_again_has_nothing_to_do(train_here, alone, capfd) -> None:
    before = (alone / "metrics.jsonl").read_text()
    assert not train_here(f"out={alone}", "batch=4")
    assert "nothing to do" in "".join(capfd.readouterr())
    assert (alone / "metrics.jsonl").read_text() == before


def test_training_starts_from_another_runs_weights(train_here, alone, tmp_path) -> None:
    given = [f"init={alone}", "batch=2", "steps=1", "optim.learning_rate=0", "validation.every=100"]
    train_here(f"out={tmp_path}", *given)
    started, theirs = saved_weights(tmp_path, "ema"), saved_weights(alone, "ema")
    assert all(torch.equal(started[key], theirs[key]) for key in theirs)


def test_a_truncated_checkpoint_is_refused_by_name(train_here, alone, tmp_path) -> None:
    folder = shutil.copytree(newest_checkpoint(alone), tmp_path / newest_checkpoint(alone).name)
    (folder / "trainer" / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"rank_00000\.safetensors is missing or truncated"):
        train_here(f"out={tmp_path}", "batch=4")


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_leaves_the_checkpoint_before_it(train_args, tmp_path, background: str) -> None:
    settings = ["engine.name=ddp", "batch=1", "validation.every=100", f"checkpoint.background={background}"]
    command = [*ALONE, *train_args, f"out={tmp_path}", *settings]
    assert run([*command, "steps=1"]).returncode == 0
    whole = newest_checkpoint(tmp_path)

    def fill_the_disk() -> None:  # as good as: no file of this process may grow beyond 30 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = subprocess.run([*command, "steps=2"], cwd=ROOT, capture_output=True, text=True, preexec_fn=fill_the_disk)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "step_0000002" in last and "disk" in last, done.stderr
    assert newest_checkpoint(tmp_path) == whole
    assert run([*command, "steps=2"]).returncode == 0
    assert newest_checkpoint(tmp_path).name == "step_0000002"


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ("optim.learning_rat=1", "'optim.learning_rate'"), ("objective.name=bass", "base, autoregressive"),
        ("objective.context_wait=1", r"objective\.context_weight"), ("manifest=nowhere.json", "nowhere.json"),
        ("model.action.keyboard_dim_in=3", "keyboard_dim_in=3"),
        ("codec=nowhere", "nowhere"), ("init=nowhere", "nowhere"), ("engine.stage=5", r"engine\.stage"),
        ("engine.name=deepspeed", "accelerate launch"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_leaves_nothing(train_here, tmp_path, changed: str, fault: str) -> None:
    with pytest.raises(Exception, match=fault) as error:
        train_here(f"out={tmp_path / 'run'}", changed)
    assert is_users(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_new_objective_is_a_file_and_a_line_and_trains_from_python(
    train_args, own_signals, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "toy", Toy)
    given = [f"out={tmp_path}", "engine.name=ddp", "batch=2", "steps=2", "validation.every=2"]
    config = load_config(TrainConfig, [*train_args, *given])
    asked_to_stop = train(replace(config, objective={"name": "toy", "scale": 0.5}))
    lines = read_metrics(tmp_path)
    assert not asked_to_stop and [line["step"] for line in lines] == [1, 2, 2]
    assert {"loss", "loss/latent_1", "loss/latent_5"} <= lines[0].keys() and "heldout/right" in lines[2]
    assert newest_checkpoint(tmp_path).name == "step_0000002"


def test_a_games_keys_and_mouse_reach_the_model_by_themselves(codec_folder, own_signals, tmp_path) -> None:
    keys = tuple(f"key{i}" for i in range(7))
    game = replace(GAME, action_space=ActionSpace("seven", keys, mouse=False))
    for i in range(2):
        write_recording(tmp_path / "recordings" / f"episode_{i:05d}", game, seed=i)
    encode(EncodeConfig(game, str(tmp_path / "recordings"), str(codec_folder), str(tmp_path), heldout_every=0))
    args = ["configs/models/demo.yaml", "configs/train/demo_base.yaml", "engine.name=ddp", "model.num_layers=1"]
    args += ["model.action.blocks=[0]", f"manifest={tmp_path}/train/manifest.json", f"codec={codec_folder}"]
    args += [f"out={tmp_path / 'run'}", "steps=2", "batch=1"]
    train(load_config(TrainConfig, args))
    action = read_world_config(newest_checkpoint(tmp_path / "run")).model.action
    assert action and (action.keyboard_dim_in, action.enable_keyboard, action.enable_mouse) == (7, True, False)
    with pytest.raises(UserError, match=r"keyboard_dim_in=4, but 'seven' has 7 keys"):
        check_run(load_config(TrainConfig, [*args, "model.action.keyboard_dim_in=4"]), ranks=1)


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    config = OptimConfig(warmup_steps=4, decay_steps=5)
    rates = [rate_factor(config, step, 20) for step in range(20)]
    assert rates[:16] == [0.25, 0.5, 0.75] + [1.0] * 13
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("objective", [Autoregressive(base_share=0.0, curriculum=0.0), DiffusionForcing()])
def test_one_clip_can_be_overfitted(objective: Objective) -> None:
    generator, frames = torch.Generator().manual_seed(0), 21 if objective.causal else 18
    keyboard, mouse = (
        torch.rand(1, frames, 4, generator=generator).round(),
        torch.randn(1, frames, 2, generator=generator),
    )
    batch = Batch(torch.randn(1, 16, 6, 4, 6, generator=generator), keyboard, mouse, ("episode:0",))
    causal = CausalConfig(block=3, window=6) if objective.causal else None
    config = replace(DIT, dim=64, ffn_dim=128, causal=causal, attention="dense" if causal else "sdpa")
    dit, flow = ActionDiT(config, torch.Generator().manual_seed(0)), FlowMatch(FlowMatchConfig())
    optimizer, seen = make_optimizer(dit, OptimConfig(learning_rate=5e-3)), []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10, (300 - step) / 150)
        loss, _ = objective.loss(dit, flow, batch, 1.0, rng_for_step(0, step, step, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    # Who knows the clip can read the noise off the input: the loss of 1 + its variance goes towards 0.
    assert sum(seen[-30:]) < 0.35 * sum(seen[:30]), (seen[:3], seen[-3:])


def test_a_consolidated_world_plays_elsewhere(tmp_path: Path, alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    consolidate(ConsolidateConfig(str(alone), str(tmp_path / "whole")))
    moved = (tmp_path / "whole").rename(tmp_path / "elsewhere")
    assert find_codec(moved, read_world_config(moved)) == str(moved / "codec")
    assert generate(moved, tmp_path) == 0, capsys.readouterr().err
    with pytest.raises(UserError, match="checkpoint="):
        consolidate(ConsolidateConfig(str(alone), f"{newest_checkpoint(alone)}/world"))


def test_a_config_in_the_run_s_own_folder_is_read_and_stays_as_it_is(train_args: list[str], tmp_path: Path) -> None:
    config = Path(shutil.copy(train_args[0], tmp_path / "config.yaml"))
    done = run([*ALONE, str(config), f"out={tmp_path}", "engine.name=ddp", "steps=1", "validation.every=99"])
    assert done.returncode == 0, done.stderr
    assert config.read_bytes() == Path(train_args[0]).read_bytes()
