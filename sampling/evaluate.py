"""Judges a checkpoint on held-out episodes: how much the actions help, and whether the picture obeys them."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
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
from model.loss import NoiseSample, sigma_bins, velocity_error
from model.world import WorldModel, check_same_game, read_world_config
from sampling.config import SamplingConfig
from sampling.denoising import Denoising
from sampling.judging import Frames, Judge, mean_looks
from sampling.metrics import action_loss_table, action_variants, first_latents
from sampling.motion import EVALUATOR
from sampling.report import Compared, Report, compared, main_figures, write_page
from sampling.scripts import Scripted
from sampling.trajectories import Player, Prompt, heldout_episodes, read_prompts
from sampling.video_grid import HELD_WIDTH, Panel, VideoGrid, write_film, write_frames

WRITTEN = ("report.json", "report.html", "sheet.png", "replay.mp4", "held.mp4")  # into out=
MOST = 10_000  # clips, rollouts, or frames of one
SHOWN_PROMPTS, REPLAY_WIDTH = 3, 480  # rollouts in pictures, px of a picture of their video


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    """`python -m sampling evaluate <checkpoint>`; `guidance` is of the rollouts, not of the velocity loss."""

    recordings: str  # folder of the recordings that the shards were made of
    manifest: str  # of the held-out shards
    out: str  # folder of report.json, report.html, the videos and sheets
    beside: tuple[str, ...] = ()  # report.json of other models on the same recordings: the page shows theirs too
    reader: Reader = "worldloom"  # format of the recordings
    clips: int = within(1, MOST, 24)  # held-out clips of the velocity loss
    starts: int = within(1, MOST, 16)  # places in held-out episodes from which recorded actions are followed
    frames: tuple[int, ...] = within(1, MOST, (9, 21, 33, 48))  # after the first, at which pictures are compared
    held_starts: int = within(1, MOST, 16)  # places from which every command is held, and the view turns and returns
    held_spans: int = within(1, MOST, 3)  # of 12 frames for which a command is held
    long_s: float = within(0, 3600, 60.0)  # s of random actions, in which nothing must drift; 0: none
    long_starts: int = within(1, MOST, 3)  # places from which they begin, computed at once
    steps: int = 6  # Euler steps per chunk or block
    batch: int = within(1, MOST, 16)  # rollouts or clips computed at once

    def __post_init__(self) -> None:
        _ = self.denoising, Scripted(1, 0, self.mouse_deg)  # checks of their own
        if not self.frames:
            raise UserError("frames= must name one frame or more, as in [9,48]")

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
    starts = max(config.starts, config.held_starts, config.long_starts)
    prompts = read_prompts(episodes, game, starts, 1 + max(config.frames), config.seed)
    world = config.load(checkpoint)
    player = Player(world, config.denoising, config.batch, config.seed)
    began, method = time.perf_counter(), "chunked" if world.layout == "chunked" else "streaming"
    with storage.writing_folder(config.out, last="report.html") as folder:  # fails before the work if it cannot write
        report = {"checkpoint": checkpoint, "method": method, "settings": asdict(config), "evaluator": EVALUATOR}
        report["velocity_loss"] = judge_losses(world, config, min(config.clips, manifest.clips))
        measured, films = judge_rollouts(Judge(player, prompts, config.mouse_deg), config)
        for film in films:
            write_film(folder / f"{film.name}.mp4", film, game)
        _write_sheet(folder / "sheet.png", films, config.frames, game)
        report |= {**measured, "seconds": round(time.perf_counter() - began, 1)}
        storage.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_page(folder / "report.html", report, films, others)
    print("\n".join(f"{name}: {value}" for name, value in main_figures(report).items()))
    print(f"evaluated in {report['seconds']:.0f} s; open {storage.join(config.out, 'report.html')}")


def judge_rollouts(judge: Judge, config: EvaluateConfig) -> tuple[Report, list[VideoGrid]]:
    """The figures of rollouts, and what is shown of them."""
    report, frames = judge.along_recorded(config.starts, config.frames)
    looks = mean_looks({name: frames[name] for name in ("real", "codec")})
    report["held"], held = judge.held(config.held_starts, config.held_spans)
    if judge.space.mouse:
        report["return"] = judge.away_and_back(config.held_starts, held["idle"])
    if config.long_s:
        report["long"] = {**judge.long_run(config.long_starts, config.long_s), **looks}
    return report, [replay_film(judge.prompts, frames["generated"]), held_film(judge, held)]


@torch.inference_mode()
def judge_losses(world: WorldModel, config: EvaluateConfig, clips: int) -> Report:
    """Tables of held-out velocity loss by actions, for the first chunk after a frame and the next after a chunk (or
    block, of a causal model)."""
    batch = Stream(config.manifest, clips, config.seed, workers=0).batch_at(0)
    generator = torch.Generator().manual_seed(config.seed)
    temporal, bins, tables = world.codec.config.temporal, sigma_bins(world.flow), {}
    for count, kind in enumerate(("first_chunk", "next_chunk"), start=1):
        if batch.latents.shape[2] < count * world.block or count * world.block == 1:  # one latent is the given frame
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


def replay_film(prompts: Sequence[Prompt], generated: np.ndarray) -> VideoGrid:
    """Real play beside what the model generates from the same first frame and actions."""
    panels, shown, count = [], prompts[:SHOWN_PROMPTS], generated.shape[1]
    for prompt, frames in zip(shown, generated, strict=False):
        panels += [Panel("real play", prompt.frames[:count], prompt.actions[:count])]
        panels += [Panel("generated", frames, prompt.actions[:count])]
    names = "; ".join(prompt.name for prompt in shown)
    sentence = f"Left what was recorded, right what the model makes of its first frame and actions ({names})."
    return VideoGrid("replay", "Real play and the model's", sentence, panels, 2, REPLAY_WIDTH)


def held_film(judge: Judge, held: Frames) -> VideoGrid:
    """Every command of the game held from the first prompt, whose rollouts come first."""
    panels = []
    for command, rollouts in held.items():
        actions = judge.script(command, rollouts.shape[1])
        panels.append(Panel(command.replace("_", " "), rollouts[0], actions))
    sentence = "The same first frame and the same noise, another command held in each picture."
    title = f"One command held, from {judge.prompts[0].name}"
    return VideoGrid("held", title, sentence, panels, 4, HELD_WIDTH)


def _write_sheet(path: Path, films: Sequence[VideoGrid], frames: Sequence[int], game: GameConfig) -> None:
    """A row per rollout of `films`, at the first frame, at `frames` and, of shorter rollouts, at their last."""
    panels = [panel for film in films for panel in film.panels]
    title = "Real play and what the model makes of its first frame and the actions; below, one command held"
    write_frames(path, panels, [0, *sorted(frames)], title, game)
