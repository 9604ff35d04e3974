"""Judges a checkpoint on held-out episodes: what the actions are worth, and whether the picture obeys."""

import json
import os
import time
from dataclasses import asdict, dataclass
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
from sampling.motion import EVALUATOR, Motion, all_motions, chunk_motion, held_command, held_table, turn_agreement
from sampling.report import Compared, Report, compared, main_figures, write_page
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
from sampling.video_grid import held_grid, replay_grid, write_grid

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
    for what in ("codec_hash", "layout"):
        of_clips, of_model = getattr(manifest, what), getattr(trained, what)
        if of_clips != of_model:
            raise UserError(f"{config.manifest} has {what} {of_clips}, {checkpoint} was trained on {of_model}")
    others = [read_other(path, config.out) for path in config.beside]
    episodes = heldout_episodes(config.recordings, config.reader, manifest)
    prompts = read_prompts(episodes, manifest.game, config.replay)
    held_prompts = read_prompts(episodes, manifest.game, config.held)
    world = load_world(checkpoint, config.weights, config.device, config.precision, config.vision, config.codec)
    began, method = time.perf_counter(), "chunked" if world.layout == "chunked" else "streaming"
    with storage.writing_folder(config.out, last="report.html") as folder:  # fails before the work if it cannot write
        losses = judge_losses(world, config, min(config.clips, manifest.clips))
        replayed = replay(world, prompts, config.replay)
        held = play_constant_actions(world, held_prompts, config.held, config.mouse_deg)
        report = {"checkpoint": checkpoint, "method": method, "settings": asdict(config), "evaluator": EVALUATOR}
        report |= {"velocity_loss": losses, **judge_replay(replayed)}
        report["held"] = judge_held(held, [*prompts, *held_prompts], world.game)
        grids = [replay_grid(prompts, replayed), held_grid(held_prompts[0], held, world.game, config.mouse_deg)]
        for grid in grids:
            write_grid(folder, grid, world.game)
        report["seconds"] = round(time.perf_counter() - began, 1)
        storage.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_page(folder / "report.html", report, grids, others)
    print("\n".join(f"{name}: {value}" for name, value in main_figures(report).items()))
    print(f"evaluated in {report['seconds']:.0f} s; open {storage.join(config.out, 'report.html')}")


@torch.inference_mode()
def judge_losses(world: WorldModel, config: EvaluateConfig, clips: int) -> Report:
    """Tables of held-out velocity loss by actions, for the first chunk after a frame and the next after a chunk (or
    block, of a causal model)."""
    batch = Stream(config.manifest, clips, config.seed, workers=0).batch_at(0)
    generator = torch.Generator().manual_seed(config.seed)
    temporal, bins, tables = world.codec.config.temporal, sigma_bins(world.flow), {}
    for count, kind in enumerate(("first_chunk", "next_chunk"), start=1):
        part = first_latents(batch, count * world.block, world.layout, temporal)
        if part is None:
            continue
        variants = action_variants(part)
        losses: dict[str, dict[str, Tensor]] = {variant: {} for variant in variants}
        for name, levels in tqdm(bins, desc=f"held-out loss, {kind}", unit="noise level"):
            sigma = levels[torch.randint(len(levels), (clips,), generator=generator)]
            sample = NoiseSample(sigma, torch.randn(part.latents.shape, generator=generator))
            for variant, acted in variants.items():
                losses[variant][name] = loss_of_clips(world, acted, sample, config.batch)
        tables[kind] = {"clips": clips, **action_loss_table(losses, world.flow)}
    return tables


def loss_of_clips(world: WorldModel, clips: Batch, sample: NoiseSample, batch: int) -> Tensor:
    """The loss (b) of the newest chunk or block on the CPU, `batch` clips at a time."""
    latents, causal = clips.latents.shape[2], world.dit.config.causal
    given = 1 if latents == world.block else world.block
    known, sigma = given, sample.sigma
    if causal is not None and given > 1:  # a past in the caches, not in the conditioning
        known, sigma = 1, sigma[:, None].repeat(1, latents)
        sigma[:, :given] = causal.context_noise
    parts = []
    for first in range(0, len(clips.ids), batch):
        part = slice(first, first + batch)
        some = NoiseSample(sigma[part].to(world.device), sample.noise[part].to(world.device))
        error = velocity_error(world.dit, world.flow, clips[part].to(world.device), known, some, world.layout)
        parts.append(error[:, given:].mean(dim=1).cpu())
    return torch.cat(parts)


def read_other(path: str, out: str) -> Compared:
    """The report that `evaluate` wrote to the file `path`, for a page in the folder `out`."""
    if not storage.exists(path):
        raise MissingFileError(f"no report {path}; beside= takes a report.json that evaluate wrote")
    page = str(storage.path(path).with_suffix(".html"))
    if storage.is_s3(page) == storage.is_s3(out):
        page = os.path.relpath(page, out)
    with reading(path, "beside= takes a report.json that evaluate wrote"):
        if (size := storage.size(path)) > SETTINGS_BYTES:
            raise UserError(f"it has {size} bytes")
        return compared(parse_object(storage.read_bytes(path), path), quote(page, safe="/:@"))


def judge_replay(replay: Replay) -> Report:
    """PSNR over time, how the picture answers recorded turns, and drift."""
    repeated = np.broadcast_to(replay.prompt[:, None], replay.real.shape)
    against_real = {
        "codec": psnr(replay.codec, replay.real),
        "from_context": psnr(replay.from_context, replay.real),
        "from_frame": psnr(replay.from_frame[:, 1:], replay.real[:, :-1]),
        "repeat_prompt": psnr(repeated, replay.real),
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
