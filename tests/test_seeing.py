"""What a run shows of itself: figures that add up over ranks, the same in every writer; videos, traces; waiting."""

import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from s3_server import free_port
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import ALONE, ROOT, STEPS, read_metrics, require_equal_bits, run

from configs import load_config
from data_pipeline.video import frame_times, read_frames
from model.cost import training_flops
from model.layout import CHUNK_LATENTS
from model.world import load_world, newest_checkpoint, read_world_config
from train.check import check_run
from train.config import TrainConfig
from train.metrics import MetricsWindow, loss_metrics, loss_sums, start_profiler
from train.objectives.objective import LossMetrics
from train.save import Saver
from train.validation import Videos

SEEN = [
    "wandb=true", "tensorboard=true", "peak_tflops=0.001", "profile={start: 2, steps: 2}",
    "validation.videos={every: 3, actions: [random, turn_left], frames: 20, steps: 2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def seen(train_args, tmp_path_factory) -> Path:
    """A run with every writer, videos and a trace."""
    out = tmp_path_factory.mktemp("seen")
    done = run([*ALONE, *train_args, "engine.name=ddp", "batch=2", f"out={out}", *SEEN], WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    return out


def measured(clips: int, first: int, m: int, seed: int) -> LossMetrics:
    loss, sigma = torch.rand(2, clips, m, generator=torch.Generator().manual_seed(seed))
    return LossMetrics(loss, sigma, first, torch.Size((clips, 16, first + m, 4, 6)))


def metrics_of(*parts: LossMetrics, loss_group: int = 1) -> dict[str, float]:
    return loss_metrics(loss_sums(list(parts), clip_latents=6), loss_group)


def test_metrics_of_two_ranks_add_up_to_those_of_one() -> None:
    whole = measured(4, CHUNK_LATENTS, 3, seed=0)
    halves = [replace(whole, loss=whole.loss[part], sigma=whole.sigma[part]) for part in (slice(0, 2), slice(2, 4))]
    added = loss_metrics(sum((loss_sums([half], 6) for half in halves), torch.zeros(())), loss_group=1)
    assert added == pytest.approx(metrics_of(whole))
    assert added["loss"] == pytest.approx(whole.loss.mean().item())
    assert {name for name in added if "latent" in name} == {"loss/latent_3", "loss/latent_4", "loss/latent_5"}
    assert added["loss/latent_4"] == pytest.approx(whole.loss[:, 1].mean().item())


def test_a_clip_counts_once_however_many_latents_it_has_and_a_metric_over_nothing_is_left_out() -> None:
    short, long = measured(2, 1, 2, seed=1), measured(2, 3, 3, seed=2)
    assert metrics_of(short, long)["loss"] == pytest.approx((short.loss.mean() + long.loss.mean()).item() / 2)
    low = LossMetrics(torch.ones(1, 1), torch.zeros(1, 1), 2, torch.Size((1, 16, 3, 4, 6)))
    assert metrics_of(low, loss_group=3).keys() == {"loss", "loss/sigma_0.00-0.25", "loss/block_0"}
    assert metrics_of() == {}


# As much of an engine as metrics need.
ONE_RANK: Any = SimpleNamespace(
    accelerator=SimpleNamespace(process_index=0, num_processes=1), sum_over_ranks=lambda values: values
)


def window(config: TrainConfig, applied: bool = True) -> dict[str, float]:
    """The metrics of one step."""
    metrics = MetricsWindow(config, clip_latents=6, loss_group=1)
    metrics.seconds |= {"step": 0.7, "forward": 0.5}
    metrics.skipped_clips += 1
    metrics.end_step([measured(2, 3, 3, seed=0)], applied)
    return metrics.reduce(ONE_RANK)


def test_tokens_and_flops_are_those_of_the_passes(train_args) -> None:
    config = load_config(TrainConfig, [*train_args, "out=x", "peak_tflops=0.5"])
    metrics = window(config)  # 2 clips of 6 latents of 4 x 6, in patches of 2 x 2
    per_token = training_flops(config.model, 2, 6, 4, 6) / (2 * 6 * 2 * 3)
    assert metrics["mfu"] == pytest.approx(metrics["tokens/s"] * per_token / 0.5e12)
    assert metrics["tokens/s"] * metrics["s/step"] == pytest.approx(2 * 6 * 2 * 3)
    without = window(replace(config, peak_tflops=None))
    assert "mfu" not in without and "tokens/s" in without


def test_a_skipped_step_counts_with_its_time_and_not_with_its_losses(train_args) -> None:
    metrics = window(load_config(TrainConfig, [*train_args, "out=x"]), applied=False)
    assert "loss" not in metrics and metrics["skipped_steps"] == metrics["skipped_clips"] == 1
    assert metrics["s/step"] == 0.7 and metrics["forward_s/slowest_rank"] == 0.5


def test_every_writer_gets_every_metric(seen) -> None:
    lines = read_metrics(seen)
    entries = [(line["step"], name, value) for line in lines for name, value in line.items() if name != "step"]
    metrics = [entry for entry in entries if not entry[1].startswith("video/")]
    assert all(math.isfinite(value) for _, _, value in metrics)
    wanted = {"loss/latent_3", "loss/latent_5", "tokens/s", "mfu", "heldout/right", "grad_norm", "skipped_steps"}
    assert wanted <= {name for _, name, _ in metrics}
    board = EventAccumulator(str(seen / "tensorboard")).Reload()
    shown = {(event.step, name): event.value for name in board.Tags()["scalars"] for event in board.Scalars(name)}
    assert shown == {(step, name): pytest.approx(value, rel=1e-6) for step, name, value in metrics}
    (file,) = seen.glob("wandb/offline-run-*/run-*.wandb")
    assert all(name.encode() in file.read_bytes() for _, name, _ in metrics)


def test_videos_come_from_the_averaged_weights_and_go_to_every_writer(seen, train_args) -> None:
    shown = [line for line in read_metrics(seen) if any(name.startswith("video/") for name in line)]
    assert [line["step"] for line in shown] == [3, 6, 8]
    names = [name for name in shown[-1] if name != "step"]
    assert len(names) == 2 and all("step_0000008" in shown[-1][name] for name in names)
    board = EventAccumulator(str(seen / "tensorboard")).Reload()
    assert all([event.step for event in board.Images(name)] == [3, 6, 8] for name in names)
    assert len(list(seen.glob("wandb/offline-run-*/files/media/videos/video/*.mp4"))) == 6
    np.testing.assert_allclose(frame_times(seen / shown[-1][names[0]]), np.arange(20) / 17.5)
    # The last ones again, from the checkpoint that was written right after them.
    checkpoint, pieces = newest_checkpoint(seen), list[None]()
    config = load_config(TrainConfig, [*train_args, *SEEN, f"out={seen / 'again'}"])
    videos = Videos(config, read_world_config(checkpoint))
    again = videos.make(load_world(checkpoint), STEPS, lambda: pieces.append(None))
    assert len(pieces) == 2 * 3  # chunks of nine frames
    for name, path in again.items():
        assert path.read_bytes() == (seen / shown[-1][f"video/{name}"]).read_bytes()
    left, right = (np.stack(list(read_frames(path)))[1:] for path in again.values())
    assert not np.array_equal(left, right)


def test_training_does_not_notice_that_it_is_watched(seen, train_args, tmp_path) -> None:
    done = run([*ALONE, *train_args, "engine.name=ddp", "batch=2", f"out={tmp_path}"])
    assert done.returncode == 0, done.stderr
    require_equal_bits(seen, tmp_path)
    watched, unwatched = ([line.get("heldout/right") for line in read_metrics(out)] for out in (seen, tmp_path))
    assert list(filter(None, watched)) == list(filter(None, unwatched)) != []


def test_a_trace_holds_the_steps_that_were_asked_for(seen) -> None:
    (path,) = (seen / "profile").iterdir()
    assert path.name == "steps_0000003-0000004_rank_00000.json.gz"
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3"}
    assert names.count("Optimizer.step#AdamW.step") == 2 and any("addmm" in name for name in names)


def test_a_run_that_ends_within_the_traced_steps_leaves_no_file(train_args, tmp_path) -> None:
    config = load_config(TrainConfig, [*train_args, f"out={tmp_path}", "profile={start: 0, steps: 2}"])
    profiler = start_profiler(config, 0, 0, print)
    profiler.step()
    assert not list(tmp_path.iterdir())
    profiler.step()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps_0000001-0000002_rank_00000.json.gz"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("validation.videos.actions=[sideways]", "sideways"), ("validation.videos.actions=[forward:x]", "frames"),
        ("validation.videos.actions=[moves.csv]", "moves.csv"), ("validation.videos.actions=[]", "actions"),
        ("validation.videos.prompts=99", "4 held-out clips"), ("validation.videos.frames=3", "frames=3"),
        ("validation.videos.steps=0", "steps=0"), ("validation.videos.few_steps=[1000]", "few_steps"),
        ("validation.videos.vision=clip.pth", "leave out validation.videos.vision"),
        ("validation.videos.evry=3", "'validation.videos.every'"), ("validation.manifest=null", "validation.manifest"),
        ("validation.manifest=nowhere.json", "nowhere.json"), ("profile={start: 7, steps: 2}", "steps=8"),
        ("peak_tflops=0", "peak_tflops=0.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_before_training(train_args, tmp_path, setting: str, fault: str) -> None:
    with pytest.raises((ValueError, OSError), match=fault) as error:
        args = [*train_args, f"out={tmp_path}", "validation.videos.every=4", setting]
        check_run(load_config(TrainConfig, args), ranks=1)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_held_out_clips_of_another_kind_are_refused(train_args, encoded, tmp_path) -> None:
    manifest = json.loads(Path(f"{encoded}/heldout/manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "codec_hash": "0" * 12}))
    args = [*train_args, f"out={tmp_path / 'run'}", f"validation.manifest={tmp_path / 'manifest.json'}"]
    with pytest.raises(ValueError, match=r"has codec_hash 000000000000.*encode both"):
        check_run(load_config(TrainConfig, args), ranks=1)


RANK = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from train.watchdog import Watchdog

rank, ending, meeting, folder = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=40))
watchdog = Watchdog(Path(folder), rank, 2, limit_s=100.0 if (rank, ending) == (1, "is slow") else 3.0)
with watchdog.watching():
    dist.barrier()
    if ending == "is slow":
        watchdog.begins(0, "reading a slow disk" if rank else "building the model")
        time.sleep(60 * rank)
        dist.new_group([0, 1])  # in which torch waits for the other one, with the store's connection for itself
    with watchdog.rank0_section(0, "making videos") as alive:
        for _ in range(0 if rank else 4):
            time.sleep(1.2)
            alive()
            if ending == "dies":
                sys.exit(5)
            if ending == "freezes":  # and with it the store, which answers nothing any more
                os.kill(os.getpid(), signal.SIGSTOP)
print("together again", flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "ends", "message"),
    [
        ("lives", None, "together again"),
        ("dies", 1, "missing: rank 0 (silent for"),
        ("freezes", 1, "missing: rank 0's machine, which keeps the store, does not answer"),
        ("is slow", 0, "missing: rank 1 (reading a slow disk in step 0)"),
    ],
)
def test_a_lost_or_slow_rank_is_named_and_rank_0_alone_may_take_long(tmp_path, ending, ends, message) -> None:
    # The store outlives rank 0, as one that the launcher keeps; or is in it, as on a machine that stops altogether.
    meeting = f"file://{tmp_path}/meeting" if ending in ("lives", "dies") else f"tcp://127.0.0.1:{free_port()}"
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run" if ending == "dies" else tmp_path  # what cannot be written keeps nobody alive
    program = [sys.executable, "-c", RANK]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*program, str(rank), ending, meeting, folder], cwd=ROOT, **pipes) for rank in (0, 1)]
    if ends is None:
        assert all(message in rank.communicate(timeout=60)[0] for rank in ranks)
        return
    text = ranks[ends].communicate(timeout=60)[0]
    ranks[1 - ends].kill()
    ranks[1 - ends].communicate()
    assert ranks[ends].returncode == 1 and message in text, text
    assert "making videos" in text or ending == "is slow"


def test_no_error_of_a_save_in_the_background_is_lost(train_args, tmp_path) -> None:
    def fails() -> None:
        raise RuntimeError("can't allocate memory")

    for out in (str(tmp_path), "s3://worlds/run"):
        config = replace(load_config(TrainConfig, [*train_args, "out=x"]), out=out)
        saver = Saver(None, None, config, None)  # type: ignore[arg-type]  # whoever only waits needs none of them
        saver._try("step_0000004", fails)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            saver.check()
