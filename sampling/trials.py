"""Rollouts to be judged: from places in held-out episodes, along the recorded actions or under one held command."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.motion import EXPECTED
from data_pipeline.readers import Reader, find_recordings, read_game_frames, recording_of
from data_pipeline.types import Actions, Episode, Manifest
from data_pipeline.video import to_video
from model.layout import CHUNK_FRAMES
from model.world import WorldModel
from sampling.chunked import decode_frames, encode_frames, rollout
from sampling.denoising import Denoising, Rows
from sampling.presets import presets
from sampling.scripts import Scripted, read_script
from sampling.streaming import count_blocks, rollout_blocks, whole_blocks

MOST_ROLLOUTS = 10_000


@dataclass(frozen=True)
class Start:
    """A place in a held-out episode: 9 frames to start from and what really followed."""

    name: str
    frames: np.ndarray  # (9 + 9 chunks, h w 3) uint8
    actions: Actions  # of these frames


@dataclass(frozen=True)
class RolloutSettings:
    """How many rollouts, how long, and how they are computed."""

    starts: int  # places in held-out episodes
    chunks: int  # of 9 frames, after the context chunk
    denoising: Denoising
    batch: int  # rollouts computed at once
    seed: int  # of the places and, plus the start's number, of the noise

    @property
    def frames(self) -> int:
        """Frames of one rollout."""
        return CHUNK_FRAMES * self.chunks

    def __post_init__(self) -> None:
        counts = (self.starts, self.chunks, self.batch)
        if min(counts) < 1 or max(counts) > MOST_ROLLOUTS or self.seed < 0:
            raise UserError(
                f"rollouts: starts, chunks and batch must be at least 1 and at most {MOST_ROLLOUTS}, seed at least 0"
            )


def heldout_episodes(recordings: str | Path, reader: Reader, manifest: Manifest) -> list[Episode]:
    """The episodes that the manifest's shards were made of."""
    listed = {episode for info in manifest.shards for episode in info.episodes}
    names = listed | {recording_of(episode) for episode in listed}
    found = [recording for recording in find_recordings(reader, recordings) if recording.name in names]
    episodes = [episode for recording in found for episode in recording.read(manifest.game) if episode.id in listed]
    if not episodes:
        raise UserError(f"{recordings} holds none of the manifest's {len(listed)} episodes, such as {min(listed)}")
    return episodes


def read_starts(episodes: Sequence[Episode], game: GameConfig, settings: RolloutSettings) -> list[Start]:
    """`settings.starts` places, spread over the episodes in an order and at frames drawn by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    length, starts = CHUNK_FRAMES * (1 + settings.chunks), []
    long = [episode for episode in episodes if len(episode.actions) >= length]
    if not long:
        most = max(len(episode.actions) for episode in episodes)
        raise UserError(f"no held-out episode has more than {most} frames, {length} are needed; use fewer chunks")
    order = [long[i] for i in torch.randperm(len(long), generator=generator).tolist()]
    for i in tqdm(range(settings.starts), desc="read held-out episodes", unit="start"):
        episode = order[i % len(order)]
        first = int(torch.randint(len(episode.actions) - length + 1, (), generator=generator))
        frames = np.stack(list(islice(read_game_frames(episode, game), first, first + length)))
        starts.append(Start(f"{episode.id}, frame {first}", frames, episode.actions[first : first + length]))
    return starts


@dataclass(frozen=True)
class Replay:
    """Rollouts along the recorded actions, frame by frame beside what really happened; all (b n h w 3) uint8."""

    real: np.ndarray  # the frames after the last given one, chunk by chunk
    codec: np.ndarray  # the same frames after encoding and decoding
    from_context: np.ndarray  # generated from the 9 frames before
    from_frame: np.ndarray  # generated from the last of these 9 alone; its first frame is that one again
    prompt: np.ndarray  # (b h w 3) the last given frame
    yaw_deg: list[float]  # mean commanded yaw of each chunk of each start, degrees per frame


def play_replay(world: WorldModel, starts: Sequence[Start], settings: RolloutSettings) -> Replay:
    """Both kinds of rollout from every start."""
    video = to_video(torch.from_numpy(np.stack([start.frames for start in starts])))
    seeds = [settings.seed + i for i in range(len(starts))]
    recorded = [start.actions for start in starts]
    from_context = play(world, video[:, :, :CHUNK_FRAMES], recorded, seeds, settings, "replay from 9 frames")
    last = CHUNK_FRAMES - 1
    along = [actions[last : last + CHUNK_FRAMES * settings.chunks] for actions in recorded]
    from_frame = play(world, video[:, :, last], along, seeds, settings, "replay from 1 frame")
    real = np.stack([start.frames for start in starts])
    return Replay(
        real[:, CHUNK_FRAMES:],
        _through_codec(world, video, settings.batch)[:, CHUNK_FRAMES:],
        from_context,
        from_frame,
        real[:, last],
        [
            mean_yaw_deg(between_frames(actions, CHUNK_FRAMES * chunk), world.game)
            for actions in recorded
            for chunk in range(1, 1 + settings.chunks)
        ],
    )


def between_frames(actions: Actions, first: int) -> Actions:
    """The rows that lead from frame to frame within the chunk that begins at `first`: its last row leads out of it."""
    return actions[first : first + CHUNK_FRAMES - 1]


def mean_yaw_deg(actions: Actions, game: GameConfig) -> float:
    """The mean yaw in degrees per frame; 0 without a mouse."""
    return float(actions.mouse[:, 1].mean()) * game.action_space.mouse_unit_deg if game.action_space.mouse else 0.0


def held_commands(game: GameConfig, mouse_deg: float) -> list[str]:
    """The commands of this action space whose effect on the picture is known, and idle."""
    words = presets(game.action_space, mouse_deg)
    return [command for command in [*EXPECTED, "idle"] if command in words]


def play_held(
    world: WorldModel, starts: Sequence[Start], commands: Sequence[str], settings: RolloutSettings, mouse_deg: float
) -> dict[str, np.ndarray]:
    """Per command the frames (b n h w 3) made from every start's 9 frames while it is held; the same noise for all."""
    video = to_video(torch.from_numpy(np.stack([start.frames[:CHUNK_FRAMES] for start in starts])))
    actions, seeds = [], []
    for command in commands:
        held = read_script(command, world.game.action_space, Scripted(CHUNK_FRAMES * settings.chunks, 0, mouse_deg))
        for i, start in enumerate(starts):
            before = start.actions[:CHUNK_FRAMES]
            keyboard, mouse = (
                np.concatenate([before.keyboard, held.keyboard]),
                np.concatenate([before.mouse, held.mouse]),
            )
            actions.append(Actions(keyboard, mouse))
            seeds.append(settings.seed + i)
    made = play(world, video.repeat(len(commands), 1, 1, 1, 1), actions, seeds, settings, "held commands")
    return dict(zip(commands, np.split(made, len(commands)), strict=True))


def play(
    world: WorldModel,
    prompts: Tensor,
    actions: Sequence[Actions],
    seeds: Sequence[int],
    settings: RolloutSettings,
    what: str,
) -> np.ndarray:
    """Frames (b n h w 3) uint8 of many rollouts by the world's own method, `settings.batch` at a time.

    `prompts` are pictures (b 3 h w) in [-1, 1], which come first, or clips (b 3 9 h w), which do not come again;
    `actions` have a row for every frame of prompt and rollout, n = 9 `settings.chunks`.
    """
    keyboard, mouse = (
        torch.from_numpy(np.stack(rows)).to(world.device)
        for rows in ([one.keyboard for one in actions], [one.mouse for one in actions])
    )
    method, frames, done = chunk_by_chunk if world.layout == "chunked" else block_by_block, settings.frames, []
    with tqdm(total=len(prompts) * frames, desc=what, unit="frame") as progress:
        for first in range(0, len(prompts), settings.batch):
            part, pieces, made = slice(first, first + settings.batch), [], 0
            rows = keyboard[part], mouse[part]
            for piece in method(world, prompts[part].to(world.device), rows, seeds[part], settings.denoising):
                pieces.append(piece[:, : frames - made].cpu())
                made += pieces[-1].shape[1]
                progress.update(len(piece) * pieces[-1].shape[1])
            done.append(torch.cat(pieces, dim=1))
    return torch.cat(done).numpy()


def chunk_by_chunk(
    world: WorldModel, prompt: Tensor, actions: Rows, seeds: Sequence[int], denoising: Denoising
) -> Iterator[Tensor]:
    """What a bidirectional model makes of prompts as in `play`."""
    start = prompt if prompt.ndim == 4 else encode_frames(world, prompt)
    return rollout(world, start, *actions, seeds, denoising)


def block_by_block(
    world: WorldModel, prompt: Tensor, actions: Rows, seeds: Sequence[int], denoising: Denoising
) -> Iterator[Tensor]:
    """What a causal model makes of prompts as in `play`, the last block's surplus too."""
    temporal = world.codec.config.temporal
    whole = whole_blocks(actions[0].shape[1], world.block, temporal)
    rows = [functional.pad(one, (0, 0, 0, whole - one.shape[1]), mode="replicate") for one in actions]
    known = count_blocks(prompt.shape[2], world.block, temporal, "prompt") if prompt.ndim == 5 else 0
    return islice(rollout_blocks(world, prompt, (rows[0], rows[1]), seeds, denoising), known, None)


def _through_codec(world: WorldModel, video: Tensor, batch: int) -> np.ndarray:
    """`video` (b 3 n h w), n a multiple of 9, encoded and decoded as the world's clips are: (b n h w 3) uint8."""
    frames, temporal = video.shape[2], world.codec.config.temporal
    if world.layout == "chunked":
        clips = rearrange(video, "b c (m n) h w -> (b m) c n h w", n=CHUNK_FRAMES)
    else:
        clips = functional.pad(video, (0, 0, 0, 0, 0, -(frames - 1) % temporal), mode="replicate")
    shown = [decode_frames(world, encode_frames(world, part.to(world.device))).cpu() for part in clips.split(batch)]
    return rearrange(torch.cat(shown), "(b m) n h w c -> b (m n) h w c", b=len(video))[:, :frames].numpy()
