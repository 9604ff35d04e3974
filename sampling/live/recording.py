"""What was played, as an episode in our own format that gives the same frames when it is played again."""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from configs import storage
from configs.game import GameConfig
from data_pipeline.readers.worldloom import ABOUT, ACTIONS, VIDEO, describe_episode, write_actions
from data_pipeline.video import write_video
from model.limits import Precision

PROMPT = "prompt.png"  # the start picture, which the video does not keep exactly
MOST_FRAMES = 20_000  # 19 minutes at 17.5 frames/s; what comes after is not recorded
CRF = 14
DIGITS = 4  # of a degree in actions.csv: what is played is what is recorded
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 93, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


def to_jpeg(frame: np.ndarray) -> bytes:
    """A frame (h w 3) uint8 as the page gets it: colours at full resolution, since it is shown many times larger."""
    return cv2.imencode(".jpg", frame[..., ::-1], JPEG)[1].tobytes()


class Recording:
    """The frames of one world from its start on, in a file without a name, with their actions."""

    def __init__(self, game: GameConfig, prompt: np.ndarray, seed: int, precision: Precision) -> None:
        """`prompt` (h w 3) uint8 is the start picture, of the game's size."""
        self.game, self.prompt, self.seed, self.precision = game, prompt, seed, precision
        self.keyboard: list[np.ndarray] = []  # (k) of each frame
        self.mouse_deg: list[np.ndarray] = []  # (2)
        self.changes: list[dict[str, Any]] = []  # of the denoising, with the frame that they begin with
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the recording
        self._ends, self._digest = [0], hashlib.sha256()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def revise(self, keyboard: np.ndarray, mouse_deg: np.ndarray) -> None:
        """Another row, keyboard (k) and mouse (2), for the newest frame, as `Rollout.revise` has it."""
        with self._lock:
            self.keyboard[-1:], self.mouse_deg[-1:] = [keyboard], [mouse_deg]

    def add(self, frames: np.ndarray, jpegs: Sequence[bytes], keyboard: np.ndarray, mouse_deg: np.ndarray) -> None:
        """Frames (n h w 3) uint8 with what was held during each, keyboard (n k) and mouse (n 2)."""
        if len(self) + len(frames) > MOST_FRAMES:
            return
        with self._lock:
            self.keyboard += list(keyboard)
            self.mouse_deg += list(mouse_deg)
            for jpeg in jpegs:
                self._file.write(jpeg)
                self._ends.append(self._ends[-1] + len(jpeg))
            self._file.flush()
            self._digest.update(frames.tobytes())

    def note(self, denoising: Mapping[str, Any]) -> None:
        """What the next frames are made with."""
        self.changes.append({"frame": len(self), **denoising})

    def write(self, folder: str | Path) -> None:
        """Writes the episode, whole or not at all: video.mp4, actions.csv, episode.json and prompt.png."""
        with self._lock:  # the next block may be made meanwhile
            frames, digest, changes = len(self), self._digest.hexdigest(), list(self.changes)
            keyboard, mouse = np.stack(self.keyboard), np.stack(self.mouse_deg)
        facts = {"seed": self.seed, "precision": self.precision, "denoising": changes, "frames_sha256": digest}
        about = describe_episode(self.game, frames) | facts
        with storage.writing_folder(folder, last=ABOUT, new=True) as part:
            write_video(part / VIDEO, self._read(frames), self.game.fps, CRF)
            write_actions(part / ACTIONS, self.game.action_space, keyboard, mouse)
            Image.fromarray(self.prompt).save(part / PROMPT)
            storage.write_text(part / ABOUT, json.dumps(about, indent=1) + "\n")

    def _read(self, frames: int) -> Iterator[np.ndarray]:
        """The first frames (h w 3) uint8, as they were shown."""
        for start, end in pairwise(self._ends[: frames + 1]):
            jpeg = os.pread(self._file.fileno(), end - start, start)  # the next frame may be written meanwhile
            frame = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
            assert frame is not None  # it is ours
            yield frame
