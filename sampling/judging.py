"""What evaluation measures on rollouts: along recorded actions, under held commands, for a minute, away and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.game import ActionSpace
from data_pipeline.motion import EXPECTED
from data_pipeline.types import Actions
from model.layout import CHUNK_FRAMES
from model.world import WorldModel
from sampling.appearance import LOOKS, correlation, decibels, grid_ratio, looks, psnr, squared_error
from sampling.motion import AXES, SPAN, all_motions, held_table, recorded_spans, share_along, span_means
from sampling.scripts import Scripted, read_script, script_words
from sampling.trajectories import Player, Prompt

EDGE_S, TAIL_S = 10.0, 20.0  # of a long run: the first and last s, which are compared; the last in which it turns
RETURN_DEG = 30.0  # that the view turns away before it comes back
TURNING = (("turn_left", "turn_right"), ("left", "right"))  # what moves the picture to the right, and to the left

Table = dict[str, Any]
Frames = dict[str, np.ndarray]  # rollouts (b n h w 3) uint8 by what made them


@dataclass(frozen=True)
class Judge:
    """Measures rollouts from the first frames of held-out prompts."""

    player: Player
    prompts: Sequence[Prompt]
    mouse_deg: float  # degrees per frame of turns

    @property
    def space(self) -> ActionSpace:
        return self.player.world.game.action_space

    @property
    def turns(self) -> tuple[str, ...]:
        """The game's two commands that move the picture to the right and to the left; none if it has no such."""
        return next((pair for pair in TURNING if set(pair) <= script_words(self.space).keys()), ())

    def along_recorded(self, starts: int, at: Sequence[int]) -> tuple[Table, Frames]:
        """PSNR, grid and sharpness along the recorded actions, and the frames: real, the codec's, generated."""
        last = 1 + max(at)
        real = np.stack([prompt.frames[:last] for prompt in self.prompts[:starts]])
        recorded = [prompt.actions[:last] for prompt in self.prompts[:starts]]
        generated = self.player.play(real[:, 0], recorded, "along recorded actions")
        frames = {"real": real, "codec": self.player.through_codec(real), "generated": generated}
        return along_table(frames, at, grid_px(self.player.world)), frames

    def held(self, starts: int, spans: int) -> tuple[Table, Frames]:
        """How the picture moves under every command of the game, held from the first frame on, beside the recordings;
        and the rollouts with nothing pressed, of every other command the first one."""
        motions = all_motions(np.stack([prompt.frames for prompt in self.prompts]))
        recorded = recorded_spans(motions, [prompt.actions for prompt in self.prompts], self.space)
        made, shown = {}, {}
        for command in script_words(self.space):
            actions = self.script(command, 1 + spans * SPAN)
            rollouts = self.player.play(self._pictures(starts), [actions] * starts, f"held {command}")
            made[command] = span_means(all_motions(rollouts))
            shown[command] = rollouts if command == "idle" else rollouts[:1]
        return held_table(made, recorded), shown

    def long_run(self, starts: int, seconds: float) -> Table:
        """Whether pictures stay as sharp, bright and colourful under random actions as they begin, and whether turns
        are obeyed in the end."""
        fps = self.player.world.game.fps
        frames = max(2, round(seconds * fps))
        spans = min(round(TAIL_S * fps), frames // 2) // SPAN if self.turns else 0
        signs = np.random.default_rng(self.player.seed).choice([1, -1], (starts, spans))
        actions = [self._random_then_turns(frames, self.player.seed + i, row) for i, row in enumerate(signs)]
        seen, end, made = [], [], 0
        for piece in self.player.pieces(self._pictures(starts), actions, f"{seconds:g} s of random actions"):
            seen.append(np.stack([looks(shown) for shown in piece]))
            made += piece.shape[1]
            if made > frames - spans * SPAN - 1:
                end.append(piece)
        table = {"seconds": seconds, "rollouts": starts, **drift_table(np.concatenate(seen, axis=1), fps)}
        if spans:
            motions = all_motions(np.concatenate(end, axis=1)[:, -spans * SPAN - 1 :])
            along = span_means(motions)[:, AXES.index(EXPECTED[self.turns[0]][0])] * signs.ravel()
            table["turns"] = {"commands": list(self.turns), "obeyed": share_along(along), "spans": along.size}
        return table

    def away_and_back(self, starts: int, idle: np.ndarray) -> Table:
        """Whether the first frame is found again after a turn away and back within what the model remembers, beside
        what stays of it with nothing pressed, `idle` (b n h w 3)."""
        within_memory = (remembered_frames(self.player.world) - 1) // 2
        count = max(1, min(math.ceil(RETURN_DEG / max(abs(self.mouse_deg), 1e-3)), within_memory))
        scripts = [f"{there}:{count},{back}:{count}" for there, back in (self.turns, self.turns[::-1])]
        first, actions = self._pictures(starts), [self.script(script, 2 * count + 1) for script in scripts]
        frames = self.player.play(first, [actions[i % 2] for i in range(starts)], "away and back")
        compared = {
            "codec": self.player.through_codec(first[:, None])[:, 0],
            "returned": frames[:, -1],
            "idle": idle[:, min(2 * count, idle.shape[1] - 1)],
            "away": frames[:, count],
        }
        if starts > 1:
            compared["another rollout"] = np.roll(frames[:, -1], 1, axis=0)
        likeness = {
            name: {"psnr_db": float(psnr(made, first).mean()), "correlation": float(correlation(made, first).mean())}
            for name, made in compared.items()
        }
        return {"degrees": count * self.mouse_deg, "frames": 2 * count, "rollouts": starts, "likeness": likeness}

    def _pictures(self, starts: int) -> np.ndarray:
        return np.stack([prompt.frames[0] for prompt in self.prompts[:starts]])

    def script(self, script: str, frames: int, seed: int = 0) -> Actions:
        """The rows of a script."""
        return read_script(script, self.space, Scripted(frames, seed, self.mouse_deg))

    def _random_then_turns(self, frames: int, seed: int, signs: np.ndarray) -> Actions:
        """Rows of random play, then spans of turns, > 0 those that move the picture to the right; the last frame's row
        leads nowhere."""
        turning = [self.script(self.turns[int(sign < 0)], SPAN) for sign in signs]
        rows = [self.script("random", frames - SPAN * len(turning), seed), *turning]
        keyboard, mouse = (np.concatenate([getattr(part, name) for part in rows]) for name in ("keyboard", "mouse"))
        return Actions(np.roll(keyboard, -1, axis=0), np.roll(mouse, -1, axis=0))


def grid_px(world: WorldModel) -> tuple[int, int]:
    """Rows and columns of the picture, px, that one token of the model stands for."""
    _, rows, columns = world.dit.config.patch_size
    return world.codec.config.spatial * rows, world.codec.config.spatial * columns


def remembered_frames(world: WorldModel) -> int:
    """How many frames the model sees at most, those that it makes included."""
    causal = world.dit.config.causal
    if causal is None:
        return 2 * CHUNK_FRAMES
    assert causal.window is not None  # or it could not stream
    return causal.window * world.codec.config.temporal


def along_table(frames: Frames, at: Sequence[int], unit: tuple[int, int]) -> Table:
    """`psnr_db` of every frame after the first, and at frames `at` what is `generated` beside the `codec`, the `real`
    frames and `hold`, the first of them held, on a grid of `unit` px. PSNR is that of the mean squared error over the
    rollouts: a mean of decibels would be decided by the few episodes that stand still, where to hold is perfect."""
    real = frames["real"]
    errors = {name: squared_error(frames[name], real)[:, 1:] for name in ("codec", "generated")}
    errors["hold"] = squared_error(real[:, :1], real)[:, 1:]
    likeness = {name: decibels(error.mean(axis=0)) for name, error in errors.items()}
    table: Table = {"psnr_db": {}, "at_frames": {}, "grid_px": list(unit)}
    for name, values in likeness.items():
        table["psnr_db"][name] = {"mean": float(values.mean()), "by_frame": values.round(3).tolist()}
    for frame in at:
        row: Table = {name: {"psnr_db": float(values[frame - 1])} for name, values in likeness.items()}
        for name, shown in frames.items():
            sharpness = float(looks(shown[:, frame])[:, 0].mean())
            row[name] = {**row.get(name, {}), "grid": grid_ratio(shown[:, frame], unit), "sharpness": sharpness}
        row["above_hold_db"] = row["generated"]["psnr_db"] - row["hold"]["psnr_db"]
        row["grid_over_codec"] = row["generated"]["grid"] / max(row["codec"]["grid"], 1e-6)
        row["sharpness_over_codec"] = row["generated"]["sharpness"] / max(row["codec"]["sharpness"], 1e-6)
        if len(real) > 1:
            generated, hold = (without_each(errors[name][:, frame - 1]) for name in ("generated", "hold"))
            row["standard_error_db"] = jackknife_error(decibels(generated) - decibels(hold))
        table["at_frames"][str(frame)] = row
    return table


def without_each(values: np.ndarray) -> np.ndarray:
    """The means (n) of n > 1 values without the first, the second ... of them."""
    return (values.sum() - values) / (len(values) - 1)


def jackknife_error(values: np.ndarray) -> float:
    """Standard error of a figure from its `values` (n) without each sample (Efron and Stein 1981)."""
    return float(np.sqrt((len(values) - 1) * values.var()))


def drift_table(seen: np.ndarray, fps: float) -> Table:
    """The LOOKS of rollouts (b n 3) in their first and last EDGE_S, last over first, and by second."""
    edge = min(round(EDGE_S * fps), seen.shape[1] // 2)
    first, last = seen[:, :edge].mean(axis=(0, 1)), seen[:, -edge:].mean(axis=(0, 1))
    seconds = np.array_split(seen.mean(axis=0), max(1, round(seen.shape[1] / fps)))
    by_second = np.array([part.mean(axis=0) for part in seconds]).round(3).T.tolist()
    ends = {"first": first, "last": last, "ratio": last / np.maximum(first, 1e-6)}
    named = {name: dict(zip(LOOKS, values.tolist(), strict=True)) for name, values in ends.items()}
    return {**named, "by_second": dict(zip(LOOKS, by_second, strict=True))}


def mean_looks(frames: Mapping[str, np.ndarray]) -> Table:
    """The mean LOOKS of all frames (b n h w 3) of each name."""
    means = {name: np.mean([looks(rollout) for rollout in rollouts], axis=(0, 1)) for name, rollouts in frames.items()}
    return {name: dict(zip(LOOKS, values.tolist(), strict=True)) for name, values in means.items()}
