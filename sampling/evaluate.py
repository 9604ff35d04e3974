"""Judges a checkpoint on held-out episodes: how much the actions help, and whether the picture obeys them."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from urllib.parse import quote

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from configs import storage, within
from configs.errors import MissingFileError, UserError
from configs.game import GameConfig
from configs.untrusted import SETTINGS_BYTES, parse_object, reading
from data_pipeline.readers import Reader
from data_pipeline.shards import load_manifest
from data_pipeline.stream import Stream
from data_pipeline.types import Batch
from model.layout import CHUNK_FRAMES
from model.loss import NoiseSample, sigma_bins, velocity_error
from model.world import WorldModel, check_same_game, read_world_config
from sampling.config import SamplingConfig
from sampling.denoising import Denoising
from sampling.metrics import action_loss_table, action_variants, first_latents, picture_statistics, psnr
from sampling.motion import EVALUATOR, all_motions, held_table, turn_agreement
from sampling.report import Compared, Report, compared, main_figures, write_page
from sampling.scripts import Scripted
from sampling.trajectories import Player, Prompt, commanded_yaw, heldout_episodes, read_prompts
from sampling.video_grid import HELD_WIDTH, Panel, VideoGrid, write_grid

WRITTEN = ("report.json", "report.html", "replay.mp4", "replay.png", "held.mp4", "held.png")  # into out=
MOST = 10_000  # clips, rollouts, or chunks of one
SHOWN_PROMPTS, REPLAY_WIDTH = 3, 480  # rollouts of the replays' video, and px of one of its pictures


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    """`python -m sampling evaluate <checkpoint>`; `guidance` is of the rollouts, not of the velocity loss."""

    recordings: str  # folder of the recordings that the shards were made of
    manifest: str  # of the held-out shards
    out: str  # folder of report.json, report.html, the videos and sheets
    beside: tuple[str, ...] = ()  # report.json of other models on the same recordings: the page shows theirs too
    reader: Reader = "worldloom"  # format of the recordings
    clips: int = within(1, MOST, 24)  # held-out clips of the velocity loss
    starts: int = within(1, MOST, 8)  # places in held-out episodes from which rollouts begin
    chunks: int = within(1, MOST, 6)  # of 9 frames per rollout along the recorded actions
    held_starts: int = within(1, MOST, 8)  # as starts, for the held commands
    held_chunks: int = within(1, MOST, 3)  # as chunks, for the held commands
    steps: int = 6  # Euler steps per chunk or block
    batch: int = within(1, MOST, 16)  # rollouts or clips computed at once

    def __post_init__(self) -> None:
        _ = self.denoising, Scripted(1, 0, self.mouse_deg)  # checks of their own

    @property
    def denoising(self) -> Denoising:
        return Denoising(self.steps, guidance=self.guidance)


def evaluate(config: EvaluateConfig) -> None:
    """Judge a checkpoint on held-out episodes: <checkpoint> recordings=... manifest=... out=<folder of the report>"""
    outs = [storage.join(config.out, name) for name in WRITTEN]
    checkpoint = config.find(outs, recordings=config.recordings, manifest=config.manifest, beside=config.beside)
    manifest, trained = load_manifest(config.manifest), read_world_config(checkpoint)
    check_same_game(trained.game, manifest.game, config.manifest)
    for what in ("codec_hash", "layout"):
        of_clips, of_model = getattr(manifest, what), getattr(trained, what)
        if of_clips != of_model:
            raise UserError(f"{config.manifest} has {what} {of_clips}, {checkpoint} was trained on {of_model}")
    others = [read_other(path, config.out) for path in config.beside]
    episodes, game = heldout_episodes(config.recordings, config.reader, manifest), manifest.game
    prompts = read_prompts(episodes, game, config.starts, config.chunks, config.seed)
    held_prompts = read_prompts(episodes, game, config.held_starts, config.held_chunks, config.seed + 1)
    world = config.load(checkpoint)
    player = Player(world, config.denoising, config.batch, config.seed)
    began, method = time.perf_counter(), "chunked" if world.layout == "chunked" else "streaming"
    with storage.writing_folder(config.out, last="report.html") as folder:  # fails before the work if it cannot write
        report = {"checkpoint": checkpoint, "method": method, "settings": asdict(config), "evaluator": EVALUATOR}
        report["velocity_loss"] = judge_losses(world, config, min(config.clips, manifest.clips))
        replayed = player.replay(prompts)
        report |= judge_replay(replayed, commanded_yaw(prompts, game))
        rollouts = replace(player, seed=config.seed + 1).constant_actions(held_prompts, config.mouse_deg)
        report["held"] = held_table({command: all_motions(frames) for command, frames in rollouts.items()})
        grids = [replay_grid(prompts, replayed["from_context"])]
        grids += [held_grid(held_prompts[0], rollouts, config.mouse_deg, game)]
        for grid in grids:
            write_grid(folder, grid, game)
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
        if batch.latents.shape[2] < count * world.block:
            continue
        part = first_latents(batch, count * world.block, world.layout, temporal)
        variants = action_variants(part)
        losses: dict[str, dict[str, Tensor]] = {variant: {} for variant in variants}
        for name, levels in tqdm(bins, desc=f"held-out loss, {kind}", unit="noise level"):
            sigma = levels[torch.randint(len(levels), (clips,), generator=generator)]
            sample = NoiseSample(sigma, torch.randn(part.latents.shape, generator=generator))
            for variant, clips_of_variant in variants.items():
                losses[variant][name] = loss_of_clips(world, clips_of_variant, sample, config.batch)
        tables[kind] = {"clips": clips, **action_loss_table(losses, world.flow)}
    return tables


def loss_of_clips(world: WorldModel, clips: Batch, sample: NoiseSample, batch: int) -> Tensor:
    """The loss (b) of the newest chunk or block on the CPU, `batch` clips at a time."""
    latents, causal = clips.latents.shape[2], world.dit.config.causal
    past = 1 if latents == world.block else world.block
    known, sigma = past, sample.sigma
    if causal is not None and past > 1:  # it is in the caches, not in the conditioning
        known, sigma = 1, sigma[:, None].repeat(1, latents)
        sigma[:, :past] = causal.context_noise
    losses = []
    for first in range(0, len(clips.ids), batch):
        part = slice(first, first + batch)
        noise = NoiseSample(sigma[part].to(world.device), sample.noise[part].to(world.device))
        error = velocity_error(world.dit, world.flow, clips[part].to(world.device), known, noise, world.layout)
        losses.append(error[:, past:].mean(dim=1).cpu())
    return torch.cat(losses)


def read_other(path: str, out: str) -> Compared:
    """The report that `evaluate` wrote to the file `path`, for a page in the folder `out`."""
    if not storage.exists(path):
        raise MissingFileError(f"no report {path}; beside= takes a report.json that evaluate wrote")
    page = str(storage.path(path).with_suffix(".html"))
    if storage.is_s3(page) == storage.is_s3(out):
        page = os.path.relpath(page, out)
    with reading(path, "beside= takes a report.json that evaluate wrote"):
        if (size := storage.path(path).stat().st_size) > SETTINGS_BYTES:
            raise UserError(f"it has {size} bytes")
        return compared(parse_object(storage.read_bytes(path), path), quote(page, safe="/:@"))


def judge_replay(frames: Mapping[str, np.ndarray], yaw_deg: Sequence[float]) -> Report:
    """PSNR over time, how the picture answers recorded turns, and drift."""
    report: Report = {"psnr_db": {}, "replay_turns": {}, "drift": {}}
    for name in ("codec", "from_context", "from_frame", "repeat_prompt"):
        values = psnr(frames[name], frames["real"][:, : frames[name].shape[1]])
        report["psnr_db"][name] = {"mean": float(values.mean()), "by_frame": values.mean(axis=0).round(3).tolist()}
    for name in ("real", "codec", "from_context"):
        report["replay_turns"][name] = turn_agreement(yaw_deg, all_motions(frames[name]))
        report["drift"][name] = drift(frames[name])
    return report


def drift(frames: np.ndarray) -> dict[str, list[float]]:
    """Brightness, contrast and sharpness of each chunk of rollouts (b n h w 3)."""
    chunks = rearrange(frames, "b (m n) h w c -> m (b n) h w c", n=CHUNK_FRAMES)
    by_chunk = [picture_statistics(chunk) for chunk in chunks]
    return {name: [round(statistics[name], 3) for statistics in by_chunk] for name in by_chunk[0]}


def replay_grid(prompts: Sequence[Prompt], generated: np.ndarray) -> VideoGrid:
    """Real play beside what the model generates from the same 9 frames and actions."""
    panels, shown = [], prompts[:SHOWN_PROMPTS]
    for prompt, frames in zip(shown, generated, strict=False):
        generated_frames = np.concatenate([prompt.frames[:CHUNK_FRAMES], frames])
        panels += [Panel("real play", prompt.frames, prompt.actions)]
        panels += [Panel("generated", generated_frames, prompt.actions)]
    names = "; ".join(prompt.name for prompt in shown)
    sentence = f"Left what was recorded, right what the model makes of the same 9 frames and actions ({names})."
    return VideoGrid("replay", "Real play and the model's", sentence, panels, 2, REPLAY_WIDTH)


def held_grid(prompt: Prompt, rollouts: Mapping[str, np.ndarray], mouse_deg: float, game: GameConfig) -> VideoGrid:
    """Every constant action from the 9 frames of `prompt`, whose rollouts come first."""
    panels = []
    for command, frames_of_all in rollouts.items():
        frames = np.concatenate([prompt.frames[:CHUNK_FRAMES], frames_of_all[0]])
        actions = prompt.with_constant_action(command, game, mouse_deg)
        panels.append(Panel(command.replace("_", " "), frames, actions))
    sentence = "The same 9 frames and the same noise, another command held in each picture."
    return VideoGrid("held", f"One command held, from {prompt.name}", sentence, panels, 4, HELD_WIDTH)
