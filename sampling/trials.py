"""Rollouts to be judged: from places in held-out episodes, along the recorded actions or under one held command."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.readers import READERS, find_episodes, read_game_frames
from data_pipeline.types import CHUNK_FRAMES, Actions, GameConfig, Manifest
from sampling.chunked import decode_frames, encode_frames, rollout, to_video
from sampling.motion import EXPECTED
from sampling.presets import presets
from sampling.scripts import Scripted, read_script
from sampling.world_model import WorldModel


@dataclass(frozen=True)
class Start:
    """A place in a held-out episode: 9 frames to start from and what really followed."""

    name: str
    frames: np.ndarray  # (9 + 9 chunks, h w 3) uint8
    actions: Actions  # of these frames


@dataclass(frozen=True)
class RolloutSettings:
    """How many rollouts, how long, and how they are computed."""

    starts: int = 8  # places in held-out episodes
    chunks: int = 6  # of 9 frames, after the context chunk
    steps: int = 6  # Euler steps per chunk
    batch: int = 16  # rollouts computed at once
    seed: int = 0  # of the places and, plus the start's number, of the noise

    def __post_init__(self) -> None:
        if min(self.starts, self.chunks, self.steps, self.batch) < 1 or self.seed < 0:
            raise ValueError("rollouts: starts, chunks, steps and batch must be at least 1, seed at least 0")


def heldout_episodes(recordings: str | Path, manifest: Manifest) -> list[Path]:
    """The episode folders that the manifest's shards were made of."""
    listed = {episode for info in manifest.shards for episode in info.episodes}
    folders = [folder for folder in find_episodes(recordings) if folder.name in listed]
    if not folders:
        raise ValueError(f"{recordings} holds none of the manifest's {len(listed)} episodes, such as {min(listed)}")
    return folders


def read_starts(folders: Sequence[Path], reader: str, game: GameConfig, settings: RolloutSettings) -> list[Start]:
    """`settings.starts` places, spread over the episodes in an order and at frames drawn by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    length, starts = CHUNK_FRAMES * (1 + settings.chunks), []
    order = [folders[i] for i in torch.randperm(len(folders), generator=generator).tolist()]
    for i in tqdm(range(settings.starts), desc="read held-out episodes", unit="start"):
        episode = READERS[reader](order[i % len(order)], game)
        room = len(episode.actions) - length
        if room < 0:
            raise ValueError(f"{episode.id} has {len(episode.actions)} frames, {length} are needed; use fewer chunks")
        first = int(torch.randint(room + 1, (), generator=generator))
        frames = np.stack(list(islice(read_game_frames(episode, game), first, first + length)))
        starts.append(Start(f"{episode.id}, frame {first}", frames, episode.actions[first : first + length]))
    return starts


@dataclass(frozen=True)
class Replay:
    """Rollouts along the recorded actions, frame by frame beside what really happened; all (b n h w 3) uint8."""

    real: np.ndarray  # the frames after the last given one, chunk by chunk
    codec: np.ndarray  # the same frames after encoding and decoding, chunk by chunk
    from_context: np.ndarray  # generated from the 9 frames before
    from_frame: np.ndarray  # generated from the last of these 9 alone; its first frame is that one again
    prompt: np.ndarray  # (b h w 3) the last given frame
    yaw_deg: list[float]  # mean commanded yaw of each chunk of each start, degrees per frame


def play_replay(world: WorldModel, starts: Sequence[Start], settings: RolloutSettings) -> Replay:
    """Both kinds of rollout from every start."""
    video = to_video(torch.from_numpy(np.stack([start.frames for start in starts])))
    seeds = [settings.seed + i for i in range(len(starts))]
    contexts = _encode(world, video[:, :, :CHUNK_FRAMES], settings.batch)
    recorded = [start.actions for start in starts]
    from_context = play(world, contexts, recorded, seeds, settings, "replay from 9 frames")
    last = CHUNK_FRAMES - 1
    along = [actions[last : last + CHUNK_FRAMES * settings.chunks] for actions in recorded]
    from_frame = play(world, video[:, :, last], along, seeds, settings, "replay from 1 frame")
    codec = []
    for chunk in range(1, 1 + settings.chunks):
        frames = video[:, :, CHUNK_FRAMES * chunk : CHUNK_FRAMES * (chunk + 1)]
        parts = [
            decode_frames(world, encode_frames(world, part.to(world.device))) for part in frames.split(settings.batch)
        ]
        codec.append(torch.cat(parts).cpu())
    real = np.stack([start.frames for start in starts])
    return Replay(
        real[:, CHUNK_FRAMES:],
        torch.cat(codec, dim=1).numpy(),
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
    contexts = _encode(world, video, settings.batch).repeat(len(commands), 1, 1, 1, 1)
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
    made = play(world, contexts, actions, seeds, settings, "held commands")
    return dict(zip(commands, np.split(made, len(commands)), strict=True))


def play(
    world: WorldModel,
    prompts: Tensor,
    actions: Sequence[Actions],
    seeds: Sequence[int],
    settings: RolloutSettings,
    what: str,
) -> np.ndarray:
    """Frames (b n h w 3) uint8 of many rollouts, `settings.batch` at a time, with a progress bar over their chunks."""
    keyboard, mouse = (
        torch.from_numpy(np.stack(rows)).to(world.device)
        for rows in ([one.keyboard for one in actions], [one.mouse for one in actions])
    )
    done = []
    with tqdm(total=len(prompts) * settings.chunks, desc=what, unit="chunk") as progress:
        for first in range(0, len(prompts), settings.batch):
            part = slice(first, first + settings.batch)
            chunks = []
            prompt = prompts[part].to(world.device)
            for chunk in rollout(world, prompt, keyboard[part], mouse[part], seeds[part], settings.steps):
                chunks.append(chunk.cpu())
                progress.update(len(chunk))
            done.append(torch.cat(chunks, dim=1))
    return torch.cat(done).numpy()


def _encode(world: WorldModel, video: Tensor, batch: int) -> Tensor:
    """Latents (b c f h w) of `video` (b 3 n h w), on the CPU."""
    return torch.cat([encode_frames(world, part.to(world.device)).cpu() for part in video.split(batch)])
