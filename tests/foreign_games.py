"""For each format a folder of recordings, the game's YAML that reads it, and what a picture then shows."""

from pathlib import Path
from typing import Any

import foreign_recordings as foreign
import numpy as np
import pytest
import yaml
from tiny_recordings import write_recording
from tiny_world import GAME

from configs import load_config, to_dict
from configs.game import GameConfig
from data_pipeline.readers import Reader, find_recordings, read_game_frames
from data_pipeline.types import Episode
from train.codec import CodecTrainConfig

GAMES = Path(__file__).parent.parent / "configs" / "games"
PRESETS = {
    "vpt": "minecraft_vpt",
    "gf_minecraft": "minecraft_gf",
    "csgo": "csgo",
    "event_log": "own_recorder",
    "table": "own_table",
}
WASD = {"forward": ["w"], "back": ["s"], "left": ["a"], "right": ["d"]}
OWN: dict[str, tuple[float, dict[str, Any]]] = {  # fps and inputs of the formats that have no game of their own
    "frames": (20, {"keys": WASD}),
    "lerobot": (20, {"keys": WASD, "axes": ["look_down", "look_right"], "pitch_deg": -3, "yaw_deg": 3}),
    "owl_control": (60, {"keys": {**WASD, "fire": ["mouse_left"]}, "pitch_deg": -0.05, "yaw_deg": 0.05}),
    "fastvideo": (
        25,
        {"keys": {"forward": ["0"], "left": ["1"], "back": ["2"], "right": ["3"]}, "pitch_deg": 30, "yaw_deg": 30},
    ),
}
# VPT's frames are kept between GUIs in 12 to 14 and in 16, and cut where ticks are left out before 30.
VPT_SPANS = [(0, 12), (15, 16), (17, 30), (30, 40)]
LENGTHS = {  # of the episodes of each format
    "frames": [30],
    "vpt": [*(end - first for first, end in VPT_SPANS), 30],
    "gf_minecraft": [29],  # what led on from the last frame is not known
    "csgo": [30],
    "lerobot": [31, 25, 28],
    "owl_control": [40],
    "event_log": [40, 40],
    "fastvideo": [40, 30],
    "table": [40, 30],
}


def write_all(root: Path) -> dict[str, Path]:
    """A folder of recordings per format."""
    foreign.write_frames(root / "frames" / "one", foreign.draw_play(30, 4, mouse=False), foreign.INPUTS["frames"], 20.0)
    foreign.write_vpt(root / "vpt", "player-20220101", foreign.draw_play(40, 9), gui=(12, 13, 14, 16), skipped_at=30)
    foreign.write_vpt(root / "vpt", "player-20220102", foreign.draw_play(30, 9, seed=1))
    foreign.write_gf(root / "gf_minecraft", "seed_1_part_1", foreign.draw_gf_play(30))
    foreign.write_csgo(root / "csgo" / "hdf5_dm_july2021_1.hdf5", foreign.draw_play(30, 13))
    foreign.write_lerobot(
        root / "lerobot", [foreign.draw_play(frames, 4, seed=frames) for frames in LENGTHS["lerobot"]]
    )
    foreign.write_owl(root / "owl_control" / "one", play := foreign.draw_play(40, 5), foreign.owl_rows(play))
    for name, play in (("one.csv", foreign.draw_play(40, 5)), ("two.jsonl", foreign.draw_play(40, 5, seed=2))):
        foreign.write_event_log(root / "event_log" / name, play, foreign.log_rows(play))
    foreign.write_fastvideo(
        root / "fastvideo", {"one": foreign.draw_play(40, 4), "two/three": foreign.draw_play(30, 4, seed=1)}
    )
    for name, play in (("one.csv", foreign.draw_play(40, 5)), ("two.jsonl", foreign.draw_play(30, 5, seed=1))):
        foreign.write_table(root / "table" / name, play)
    write_recording(root / "worldloom" / "episode_00000", GAME)
    write_recording(root / "worldloom" / "episode_00001", GAME, seed=1)
    return {path.name: path for path in root.iterdir()}


def game_args(reader: str, folder: Path, *more: str) -> list[str]:
    """The game's YAML, made small; one is written into `folder` for a format without a preset."""
    if reader in PRESETS:
        return [str(GAMES / f"{PRESETS[reader]}.yaml"), "game.height=64", "game.width=112", *more]
    if reader == "worldloom":
        game = to_dict(GAME)
    else:
        fps, inputs = OWN[reader]
        space = {"name": "own", "keys": list(inputs["keys"]), "mouse": reader != "frames", "mouse_unit_deg": 10.0}
        game = {"name": "own", "fps": fps, "height": 64, "width": 112, "action_space": space, "inputs": inputs}
    path = folder / f"{reader}.yaml"
    path.write_text(yaml.safe_dump({"reader": reader, "game": game}))
    return [str(path), *more]


def load_game(reader: str, folder: Path, *more: str) -> GameConfig:
    return load_config(CodecTrainConfig, [*game_args(reader, folder, *more), "source=x", "out=x"]).game


def read_all(reader: Reader, source: Path, game: GameConfig) -> list[Episode]:
    return [episode for recording in find_recordings(reader, source) for episode in recording.read(game)]


def refusal(reader: Reader, source: Path, *args: str) -> str:
    """The one line of the error when everything of a source is read, pictures too."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        for episode in read_all(reader, source, load_game(reader, source.parent, *args)):
            list(episode.frames())
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def require_agreement(reader: str, game: GameConfig, episodes: list[Episode]) -> None:
    """Every frame shows the action that it is given."""
    for episode in episodes:
        frames = list(read_game_frames(episode, game))
        for frame, keyboard, mouse in zip(frames, episode.actions.keyboard, episode.actions.mouse, strict=True):
            shown = show(reader, game, frame)
            assert keyboard.tolist() == shown[0]
            np.testing.assert_allclose(mouse, shown[1], atol=1e-5)


def show(reader: str, game: GameConfig, picture: np.ndarray) -> tuple[list[float], list[float]]:
    """The keyboard and mouse vectors that a picture shows."""
    inputs = foreign.INPUTS[reader]
    play = foreign.read_picture(picture, len(inputs))
    held = {name for name, down in zip(inputs, play.keyboard, strict=True) if down}
    keyboard = [float(not held.isdisjoint(game.inputs.keys[key])) for key in game.action_space.keys]
    degrees = foreign.LEVEL_DEG[reader][[0, 1], play.levels + 2] if game.action_space.mouse else np.zeros(0)
    return keyboard, (degrees / game.action_space.mouse_unit_deg).tolist()
