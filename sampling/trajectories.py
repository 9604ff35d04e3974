"""Rollouts to be judged: from pictures of held-out episodes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional
from tqdm import tqdm

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers import Reader, find_recordings, read_game_frames
from data_pipeline.readers.recording import recording_of
from data_pipeline.types import Actions, Episode, Manifest
from data_pipeline.video import to_video
from model.layout import CHUNK_FRAMES
from model.world import WorldModel
from sampling.denoising import Denoising
from sampling.play import play
from sampling.rollout import decode_frames


@dataclass(frozen=True)
class Prompt:
    """A place in a held-out episode: the picture to start from and what really followed."""

    name: str
    frames: np.ndarray  # (n h w 3) uint8
    actions: Actions  # of these frames


def heldout_episodes(recordings: str | Path, reader: Reader, manifest: Manifest) -> list[Episode]:
    """The episodes that the manifest's shards were made of."""
    listed = {episode for info in manifest.shards for episode in info.episodes}
    names = listed | {recording_of(episode) for episode in listed}
    chosen = [recording for recording in find_recordings(reader, recordings) if recording.name in names]
    episodes = [episode for recording in chosen for episode in recording.read(manifest.game) if episode.id in listed]
    if not episodes:
        raise UserError(f"{recordings} holds none of the manifest's {len(listed)} episodes, such as {min(listed)}")
    return episodes


def read_prompts(episodes: Sequence[Episode], game: GameConfig, starts: int, frames: int, seed: int) -> list[Prompt]:
    """`starts` places of `frames` frames, spread over the episodes in an order and at frames drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    long, prompts = [episode for episode in episodes if len(episode.actions) >= frames], []
    if not long:
        longest = max(len(episode.actions) for episode in episodes)
        raise UserError(f"{frames} frames are needed, the longest held-out episode has {longest}; use fewer: frames=")
    order = [long[i] for i in torch.randperm(len(long), generator=generator).tolist()]
    for i in tqdm(range(starts), desc="read held-out episodes", unit="start"):
        episode = order[i % len(order)]
        first = int(torch.randint(len(episode.actions) - frames + 1, (), generator=generator))
        shown = np.stack(list(islice(read_game_frames(episode, game), first, first + frames)))
        prompts.append(Prompt(f"{episode.id}, frame {first}", shown, episode.actions[first : first + frames]))
    return prompts


@dataclass(frozen=True)
class Player:
    """Makes rollouts of a world from single pictures."""

    world: WorldModel
    denoising: Denoising
    batch: int  # rollouts computed at once
    seed: int  # of the first rollout's noise; the next ones count on

    def play(self, pictures: np.ndarray, actions: Sequence[Actions], what: str) -> np.ndarray:
        """The frames (b n h w 3) uint8 of rollouts from `pictures` (b h w 3), which come first as the codec shows them;
        `actions` have a row for every frame."""
        done = []
        for first in range(0, len(pictures), self.batch):
            part = slice(first, first + self.batch)
            player = replace(self, seed=self.seed + first)
            done.append(np.concatenate(list(player.pieces(pictures[part], actions[part], what)), axis=1))
        return np.concatenate(done)

    def pieces(self, pictures: np.ndarray, actions: Sequence[Actions], what: str) -> Iterator[np.ndarray]:
        """The same, all rollouts at once, piece by piece as they are made."""
        start = to_video(torch.from_numpy(pictures[:, None]))[:, :, 0]
        keyboard = torch.from_numpy(np.stack([rows.keyboard for rows in actions]))
        mouse = torch.from_numpy(np.stack([rows.mouse for rows in actions]))
        seeds = range(self.seed, self.seed + len(start))
        with tqdm(total=len(start) * keyboard.shape[1], desc=what, unit="frame") as progress:
            for piece in play(self.world, start, (keyboard, mouse), seeds, self.denoising):
                progress.update(len(piece) * piece.shape[1])
                yield piece.cpu().numpy()

    @torch.inference_mode()
    def through_codec(self, frames: np.ndarray) -> np.ndarray:
        """`frames` (b n h w 3) uint8 encoded and decoded as the world's clips are."""
        world, count, shown = self.world, frames.shape[1], []
        chunked = world.layout == "chunked"
        missing = -count % CHUNK_FRAMES if chunked else -(count - 1) % world.codec.config.temporal
        for part in torch.from_numpy(frames).split(self.batch):
            video = functional.pad(to_video(part), (0, 0, 0, 0, 0, missing), mode="replicate").to(world.device)
            if chunked:
                video = rearrange(video, "b c (m n) h w -> (b m) c n h w", n=CHUNK_FRAMES)
            made = decode_frames(world, world.codec.encode(video)).cpu()
            shown.append(rearrange(made, "(b m) n h w c -> b (m n) h w c", b=len(part))[:, :count])
        return torch.cat(shown).numpy()
