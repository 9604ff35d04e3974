"""One player's world: seed, caches and decoder state of its own, the newest controls, and a recording."""

import secrets
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from configs.game import ActionSpace
from data_pipeline.readers.keys import mouse_rows
from data_pipeline.types import Actions
from model.limits import require_between
from model.world import WorldModel
from sampling.live.config import PlayConfig
from sampling.live.protocol import FRAME, FRAME_HEADER, Command, Controls, describe_denoising
from sampling.live.recording import DIGITS, Recording, to_jpeg
from sampling.play import LiveWorld

MOST_STEPS, MOST_GUIDANCE = 16, 8.0  # that a player can ask for: the others wait meanwhile


class Beginning(NamedTuple):
    """What a world begins with."""

    picture: np.ndarray  # (h w 3) uint8, of the game's size
    seed: int


class Block(NamedTuple):
    """Frames that were made together, as messages for the page."""

    number: int  # from 0 in every world
    seed: int  # of the world
    messages: list[bytes]
    seconds: float  # of making them


class Session:
    """A player. The server says what is pressed and asked for; one thread makes blocks, and it alone touches the
    world."""

    def __init__(self, number: int, world: WorldModel, beginning: Beginning, config: PlayConfig) -> None:
        self.number, self.world, self.config = number, world, config
        self.key = secrets.token_urlsafe(16)  # with which a page finds its world again
        self.asked, self.denoising, self.controls = beginning, config.denoising, Controls()
        self.own_picture: np.ndarray | None = None  # that the player brought
        self.touched = time.monotonic()  # when something was pressed, turned or asked for last
        self.left_s = 0.0  # when its page went away last
        self.block = self.frame = 0  # numbers of the next ones
        self._mouse_deg = (0.0, 0.0)  # where the mouse was when the newest block began
        self._begun: Beginning | None = None
        self._live: LiveWorld | None = None
        self.recording: Recording | None = None

    def hear(self, controls: Controls) -> None:
        """Takes the state of the controls, unless a newer one is there."""
        if controls.counter > self.controls.counter:
            before, self.controls = self.controls, controls
            if any(controls.turn) or before.keys != controls.keys or before.mouse_deg != controls.mouse_deg:
                self.touched = time.monotonic()

    def release(self) -> None:
        """Nothing is held any more, and the next page counts from the beginning."""
        self.controls, self._mouse_deg = Controls(), (0.0, 0.0)

    def change(self, command: Command) -> None:
        """Other steps, another guidance from the next block on; UserError for what is too much."""
        limits = {"steps": (1, max(MOST_STEPS, self.config.steps)), "guidance": (1.0, MOST_GUIDANCE)}
        given = {name: getattr(command, name) for name in limits if getattr(command, name) is not None}
        for name, value in given.items():
            require_between("", *limits[name], **{name: value})
        self.denoising = replace(self.denoising, **given)

    @property
    def due(self) -> bool:
        """Whether a block is to be made: the page runs out of frames, or asks for another world."""
        return self.asked is not self._begun or self.controls.wanted == self.block

    def make_block(self) -> Block:
        """The next frames, which answer the newest controls from their first one on."""
        started = time.perf_counter()
        live, recording = self._begin(self.asked)
        controls, space = self.controls, self.world.game.action_space
        keyboard, degrees = held_keys(controls.keys, space), self._degrees(controls, live.frames_due)
        revised = live.rollout.revisable
        frames = live.answer(Actions(keyboard[None], mouse_rows(space, degrees[None])))
        made = time.perf_counter()
        jpegs = [to_jpeg(frame) for frame in frames]
        encode_s, denoise_s = time.perf_counter() - made, live.rollout.denoise_s
        if revised:
            recording.revise(keyboard, degrees)
        recording.add(frames, jpegs, *(np.tile(row, (len(frames), 1)) for row in (keyboard, degrees)))
        times_ms = (1000 * seconds for seconds in (denoise_s, made - started - denoise_s, encode_s))
        place, answered = (self.number, self.block), (controls.counter, controls.stamp_ms, *times_ms)
        messages = [
            FRAME_HEADER.pack(FRAME, i, len(jpegs), 0, *place, self.frame + i, *answered) + jpeg
            for i, jpeg in enumerate(jpegs)
        ]
        self.block, self.frame = self.block + 1, self.frame + len(jpegs)
        return Block(self.block - 1, recording.seed, messages, time.perf_counter() - started)

    def settle(self) -> float:
        """Prepares the next block while the newest one is shown; returns the seconds that it took."""
        started = time.perf_counter()
        if self._live:
            self._live.settle()
        return time.perf_counter() - started

    def _begin(self, asked: Beginning) -> tuple[LiveWorld, Recording]:
        """The world that was asked for, started if it is another one than before, with the newest steps and guidance;
        and its recording."""
        live, recording, denoising = self._live, self.recording, self.denoising
        if live is None or recording is None or asked is not self._begun:
            live = LiveWorld(self.world, *asked, denoising)
            recording = Recording(self.world.game, *asked, self.world.precision)
            recording.note(describe_denoising(denoising))
            self._live, self.recording, self._begun = live, recording, asked
            self.block, self.frame, self._mouse_deg = 0, 0, self.controls.mouse_deg
        elif live.denoising is not denoising:
            live.adjust(denoising)
            recording.note(describe_denoising(denoising))
        return live, recording

    def _degrees(self, controls: Controls, frames: int) -> np.ndarray:
        """Pitch and yaw (2) of each of the next `frames`: what the mouse has turned since the block before, spread over
        them, and held arrows."""
        moved = np.subtract(controls.mouse_deg, self._mouse_deg) / frames
        self._mouse_deg = controls.mouse_deg
        limit = self.config.mouse_limit_deg
        degrees = np.clip(moved + np.multiply(controls.turn, self.config.mouse_deg), -limit, limit).round(DIGITS)
        return degrees * (self.world.game.action_space.pitch, 1)


def held_keys(bits: int, space: ActionSpace) -> np.ndarray:
    """The keyboard vector (k) float32. A key without a cap is one for when no other is held, such as `nomove`."""
    keyboard = np.array([bits >> i & 1 for i in range(len(space.keys))], dtype=np.float32)
    idle = [i for i, cap in enumerate(space.caps) if not cap]
    keyboard[idle] = not keyboard.any()
    return keyboard
