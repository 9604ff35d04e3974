"""Judges a checkpoint on held-out episodes: what the actions are worth, and whether the picture obeys."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from configs import storage
from configs.errors import MissingFileError, UserError
from configs.files import require_other_files
from configs.foreign import SETTINGS_BYTES, parse_object, reading
from configs.game import GameConfig
from data_pipeline.readers import Reader
from data_pipeline.shards import load_manifest
from data_pipeline.stream import Stream
from data_pipeline.types import Batch
from model.layout import CHUNK_FRAMES
from model.limits import require_device
from model.loss import NoiseSample, sigma_bins, velocity_error
from model.world import (
    Precision,
    Weights,
    WorldModel,
    check_same_game,
    checkpoint_files,
    find_checkpoint,
    load_world,
    read_world_config,
)
from sampling.denoising import Denoising
from sampling.metrics import action_loss_table, action_variants, first_latents, picture_statistics, psnr
from sampling.motion import EVALUATOR, Motion, chunk_motion, held_command, held_table, motions, turn_agreement
from sampling.report import Compared, compared, write_page
from sampling.scripts import Scripted
from sampling.trajectories import (
    Prompt,
    Replay,
    RolloutSettings,
    between_frames,
    heldout_episodes,
    play_constant_actions,
    read_prompts,
    replay,
)
from sampling.video_grid import VideoGrid, held_grid, replay_grid, write_grid

Figures = dict[str, Any]
WRITTEN = ("report.json", "report.html", "replay.mp4", "replay.png", "held.mp4", "held.png")  # into out=


@dataclass(frozen=True)
class EvaluateConfig:
    """`python -m sampling evaluate <checkpoint>`."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    recordings: str  # folder of the recordings that the shards were made of
    manifest: str  # of the held-out shards
    out: str  # folder of report.json, report.html, the videos and sheets
    beside: tuple[str, ...] = ()  # report.json of other models on the same recordings: the page shows theirs too
    reader: Reader = "worldloom"  # format of the recordings
    clips: int = 24  # held-out clips of the velocity loss
    starts: int = 8  # places in held-out episodes from which rollouts begin
    chunks: int = 6  # of 9 frames per rollout along the recorded actions
    held_starts: int = 8  # as starts, for the held commands
    held_chunks: int = 3  # as chunks, for the held commands
    steps: int = 6  # Euler steps per chunk or block
    guidance: float = 1.0  # by actions, of the rollouts; the velocity loss is of the model as it is
    batch: int = 16  # rollouts or clips computed at once
    seed: int = 0
    mouse_deg: float = 3.0  # degrees per frame of the held turns
    weights: Weights = "ema"
    device: str = "cpu"
    precision: Precision = "fp32"  # of the DiT's weights
    vision: str | None = None  # weights of CLIP's vision tower, for a model with vision
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise UserError(f"clips={self.clips} must be at least 1")
        _ = self.replay, self.held, Scripted(1, 0, self.mouse_deg)  # checks of their own

    @property
    def replay(self) -> RolloutSettings:
        return RolloutSettings(self.starts, self.chunks, self.denoising, self.batch, self.seed)

    @property
    def held(self) -> RolloutSettings:
        return RolloutSettings(self.held_starts, self.held_chunks, self.denoising, self.batch, self.seed + 1)

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, guidance=self.guidance)


def evaluate(config: EvaluateConfig) -> None:
    """Judge a checkpoint on held-out episodes: <checkpoint> recordings=... manifest=... out=<folder of the report>"""
    require_device(config.device)
    checkpoint = find_checkpoint(config.checkpoint)
    read = {
        "recordings": config.recordings, "manifest": config.manifest, "beside": config.beside, "vision": config.vision,
        "codec": config.codec and storage.files_at(config.codec),
        "checkpoint": checkpoint_files(checkpoint),
    }  # fmt: skip
    require_other_files([storage.join(config.out, name) for name in WRITTEN], read)
    manifest, trained = load_manifest(config.manifest), read_world_config(checkpoint)
    check_same_game(trained.game, manifest.game, config.manifest)
    if manifest.codec_hash != trained.codec_hash:
        raise UserError(
            f"{config.manifest} holds latents of codec {manifest.codec_hash}, {checkpoint} was trained on those of "
            f"{trained.codec_hash}"
        )
    if manifest.layout != trained.layout:
        raise UserError(
            f"{config.manifest} holds {manifest.layout} clips, {checkpoint} was trained on {trained.layout} ones"
        )
    others = [read_other(path, config.out) for path in config.beside]
    episodes = heldout_episodes(config.recordings, config.reader, manifest)
    prompts = read_prompts(episodes, manifest.game, config.replay)
    held_prompts = read_prompts(episodes, manifest.game, config.held)
    world = load_world(checkpoint, config.weights, config.device, config.precision, config.vision, config.codec)
    begun = time.perf_counter()
    with storage.writing_folder(config.out, last="report.html") as folder:  # a fault of out= is said before the work
        method = "chunked" if world.layout == "chunked" else "streaming"
        report: Figures = {"checkpoint": checkpoint, "method": method, "settings": asdict(config)}
        report["evaluator"] = EVALUATOR
        grids = _judge(world, config, prompts, held_prompts, report)
        for grid in grids:
            write_grid(folder, grid, world.game)
        report["seconds"] = round(time.perf_counter() - begun, 1)
        storage.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_page(folder / "report.html", report, grids, others)
    print("\n".join(summarise(report)))
    print(f"evaluated in {report['seconds']:.0f} s; open {storage.join(config.out, 'report.html')}")


def _judge(
    world: WorldModel,
    config: EvaluateConfig,
    prompts: Sequence[Prompt],
    held_prompts: Sequence[Prompt],
    report: Figures,
) -> list[VideoGrid]:
    """Puts every figure into `report`; the videos of what was judged."""
    report["velocity_loss"] = judge_actions(world, config, min(config.clips, load_manifest(config.manifest).clips))
    replayed = replay(world, prompts, config.replay)
    report |= judge_replay(replayed)
    held = play_constant_actions(world, held_prompts, config.held, config.mouse_deg)
    report["held"] = judge_held(held, [*prompts, *held_prompts], world.game)
    return [replay_grid(prompts, replayed), held_grid(held_prompts[0], held, world.game, config.mouse_deg)]


@torch.inference_mode()
def judge_actions(world: WorldModel, config: EvaluateConfig, clips: int) -> Figures:
    """Tables of held-out velocity loss by actions, for the first chunk after a frame and the next after a chunk (or
    block, of a causal model)."""
    batch = Stream(config.manifest, clips, config.seed, workers=0).batch_at(0)
    generator = torch.Generator().manual_seed(config.seed)
    kinds = {
        f"{name}_chunk": first_latents(batch, count * world.block, world.layout, world.codec.config.temporal)
        for name, count in (("first", 1), ("next", 2))
    }
    kinds = {name: part for name, part in kinds.items() if part is not None}
    bins, tables = sigma_bins(world.flow), {}
    with tqdm(total=len(kinds) * len(bins), desc="held-out loss", unit="noise level") as progress:
        for kind, part in kinds.items():
            variants = action_variants(part)
            losses: dict[str, dict[str, Tensor]] = {variant: {} for variant in variants}
            for name, levels in bins:
                sigma = levels[torch.randint(len(levels), (clips,), generator=generator)]
                draw = NoiseSample(sigma, torch.randn(part.latents.shape, generator=generator))
                for variant, acted in variants.items():
                    losses[variant][name] = loss_of_clips(world, acted, draw, config.batch)
                progress.update()
            tables[kind] = {"clips": clips, **action_loss_table(losses, world.flow)}
    return tables


def loss_of_clips(world: WorldModel, clips: Batch, draw: NoiseSample, batch: int) -> Tensor:
    """The loss (b) of the newest chunk or block on the CPU, `batch` clips at a time."""
    latents, causal = clips.latents.shape[2], world.dit.config.causal
    given = 1 if latents == world.block else world.block
    known, sigma = given, draw.sigma
    if causal is not None and given > 1:  # a past in the caches, not in the conditioning
        known, sigma = 1, sigma[:, None].repeat(1, latents)
        sigma[:, :given] = causal.context_noise
    parts = []
    for first in range(0, len(clips.ids), batch):
        part = slice(first, first + batch)
        some = clips[part].to(world.device)
        noise = NoiseSample(sigma[part].to(world.device), draw.noise[part].to(world.device))
        error = velocity_error(world.dit, world.flow, some, known, noise, world.layout)
        parts.append(error[:, given:].mean(dim=1).cpu())
    return torch.cat(parts)


def read_other(path: str, out: str) -> Compared:
    """The report that `evaluate` wrote to the file `path`, for a page in the folder `out`. Raises ValueError in one
    line for what is none."""
    if not storage.exists(path):
        raise MissingFileError(f"no report {path}; beside= takes a report.json that evaluate wrote")
    page = str(storage.path(path).with_suffix(".html"))
    if storage.is_s3(page) == storage.is_s3(out):
        page = os.path.relpath(page, out)
    with reading(path, "beside= takes a report.json that evaluate wrote"):
        if (size := storage.size(path)) > SETTINGS_BYTES:
            raise UserError(f"it has {size} bytes")
        return compared(parse_object(storage.read_bytes(path), path), quote(page, safe="/:@"))


def judge_replay(replay: Replay) -> Figures:
    """PSNR over time, how the picture answers recorded turns, and drift."""
    against_real = {
        "codec": psnr(replay.codec, replay.real),
        "from_context": psnr(replay.from_context, replay.real),
        "from_frame": psnr(replay.from_frame[:, 1:], replay.real[:, :-1]),
        "repeat_prompt": psnr(np.broadcast_to(replay.prompt[:, None], replay.real.shape), replay.real),
    }
    shown = {"real": replay.real, "codec": replay.codec, "from_context": replay.from_context}
    return {
        "psnr_db": {
            name: {"mean": float(values.mean()), "by_frame": values.mean(axis=0).round(3).tolist()}
            for name, values in against_real.items()
        },
        "replay_turns": {name: turn_agreement(replay.yaw_deg, all_motions(frames)) for name, frames in shown.items()},
        "drift": {name: drift(frames) for name, frames in shown.items()},
    }


def judge_held(held: dict[str, np.ndarray], recorded: list[Prompt], game: GameConfig) -> dict[str, dict[str, float]]:
    """How often the picture obeys a held command, beside the `recorded` chunks in which that command was held."""
    real: dict[str, list[Motion]] = {}
    for prompt in recorded:
        for first in range(0, len(prompt.frames), CHUNK_FRAMES):
            command = held_command(between_frames(prompt.actions, first), game.action_space)
            if command is not None:
                real.setdefault(command, []).append(chunk_motion(prompt.frames[first : first + CHUNK_FRAMES]))
    return held_table({command: all_motions(made) for command, made in held.items()}, real)


def drift(frames: np.ndarray) -> dict[str, list[float]]:
    """Brightness, contrast and sharpness of each chunk of rollouts (b n h w 3)."""
    chunks = rearrange(frames, "b (m n) h w c -> m (b n) h w c", n=CHUNK_FRAMES)
    statistics = [picture_statistics(chunk) for chunk in chunks]
    return {name: [round(one[name], 3) for one in statistics] for name in statistics[0]}


def all_motions(frames: np.ndarray) -> list[Motion]:
    """The motion of every chunk of rollouts (b n h w 3), rollout by rollout; OpenCV leaves the threads to us."""
    with ThreadPoolExecutor() as pool:
        return [motion for found in pool.map(motions, frames) for motion in found]


def summarise(report: Figures) -> list[str]:
    """The report's main figures, a line each."""
    lines = []
    for kind, table in report["velocity_loss"].items():
        losses = ", ".join(
            f"{name} {table[name]['loss']:.4f}" for name in ("right", "shuffled", "none") if name in table
        )
        lines.append(f"held-out velocity loss, {kind.replace('_', ' ')}: {losses}")
    means = ", ".join(f"{name} {figures['mean']:.1f}" for name, figures in report["psnr_db"].items())
    lines.append(f"PSNR along recorded actions, dB: {means}")
    turns = [f"{name} {f['agreement']:.0%}" for name, f in report["replay_turns"].items() if "agreement" in f]
    lines += [f"recorded turns, sign of the picture's motion: {', '.join(turns)}"] if turns else []
    held = ", ".join(f"{name} {figures['obeyed']:.0%}" for name, figures in report["held"].items())
    return [*lines, f"held commands obeyed: {held}"]
