"""Gameplay to start from: ViZDoom played headless by a scripted explorer, in the format of users' recordings."""

import importlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs import cache, storage, within
from configs.errors import UserError
from configs.game import GameConfig
from configs.lease import sole_writer
from configs.untrusted import parse_object
from data_pipeline.level import MAP, random_start, write_wad
from data_pipeline.readers.worldloom import ABOUT, ACTIONS, VIDEO, describe_episode, write_episode
from data_pipeline.video import fit_frame
from data_pipeline.workers import game_ended, spawn_workers

TICS_PER_S = 35
WARM_UP_TICS = 7  # at an episode's start, in which inputs do nothing, in deathmatch.wad and in others
BUTTONS = {"forward": "MOVE_FORWARD", "back": "MOVE_BACKWARD", "left": "MOVE_LEFT", "right": "MOVE_RIGHT"}
HALL = "hall"
CRF = 14  # H.264 quality: small noisy pictures need a low number
OURS = "pictures of Worldloom's own level (Apache-2.0), made with ViZDoom (MIT)"
FREEDOOM = "pictures of Freedoom (BSD-3-Clause, https://freedoom.github.io), made with ViZDoom (MIT)"


@dataclass(frozen=True)
class RecordConfig:
    """`python -m data_pipeline record`."""

    game: GameConfig
    out: str  # folder that gets one folder per episode
    episodes: int = within(1, 100_000)  # whose names then sort like numbers
    frames: int = within(2, 100_000, 105)  # per episode; they are held in memory
    seed: int = within(0, 1 << 63, 0)
    workers: int = within(1, 256, 1)  # games played at the same time; the episodes are the same for any number
    level: str = HALL  # of data_pipeline/level.py, or a scenario of ViZDoom's with its map: deathmatch.wad:map01

    def __post_init__(self) -> None:
        if TICS_PER_S % self.game.fps:
            raise UserError(f"game.fps={self.game.fps} must divide ViZDoom's {TICS_PER_S} tics per second")
        unknown = [key for key in self.game.action_space.keys if key not in BUTTONS]
        if unknown or not self.game.action_space.mouse:
            raise UserError(f"the recorder needs a mouse and knows the keys {', '.join(BUTTONS)}; unknown: {unknown}")
        if self.level != HALL and not re.fullmatch(r"[\w-]+\.wad:\w+", self.level):
            raise UserError(f"level={self.level} must be {HALL} or a scenario and a map, as in deathmatch.wad:map01")


class Explorer:
    """Holds keys and turns for a while, then others; turns away from walls, and tries other keys where it is stuck.

    Segments are short, so that many clips see a change: the rest can be told from the frames before. Half of them do
    not turn, so that keys are seen alone, and some turns are taken back, so that what left the view comes again.
    """

    # Pure forward and back are the hard ones to learn (radial flow), so they have the largest shares.
    COMBINATIONS = (("forward",), ("back",), ("left",), ("right",), ("forward", "left"), ("forward", "right"), ())
    SHARES = (0.26, 0.18, 0.15, 0.15, 0.07, 0.07, 0.12)
    FASTEST = 1.5  # degrees per tic

    def __init__(self, rng: np.random.Generator, pitch: bool = True) -> None:
        self.rng, self.looks_up_and_down = rng, pitch
        self.keys: tuple[str, ...] = ()
        self.keys_left = self.turn_left = self.turn_frames = self.stuck = 0
        self.yaw_goal = self.yaw = self.pitch_goal = self.view_pitch = self.avoiding = 0.0

    def policy(self, depth: np.ndarray, speed: float) -> tuple[tuple[str, ...], float, float]:
        """The keys held, pitch and yaw in degrees per tic, given the depth picture (h w) and the speed in units/tic."""
        rng = self.rng
        self.stuck = self.stuck + 1 if self.keys and speed < 0.5 else 0
        if self.keys_left <= 0 or self.stuck > 5:
            self.keys = self.COMBINATIONS[rng.choice(len(self.SHARES), p=self.SHARES)]
            self.keys_left, self.stuck = int(rng.integers(10, 31)), 0
        if self.turn_left <= 0:
            self._choose_turn()
        self.keys_left, self.turn_left = self.keys_left - 1, self.turn_left - 1
        self.yaw += 0.5 * (self._away_from_walls(depth) - self.yaw)
        self.yaw = self.yaw if abs(self.yaw) > 0.1 else 0.0
        pitch = float(np.clip(self.pitch_goal, -12 - self.view_pitch, 12 - self.view_pitch))
        self.view_pitch += pitch
        return self.keys, pitch, self.yaw

    def _choose_turn(self) -> None:
        rng = self.rng
        if self.yaw_goal and rng.random() < 0.2:
            self.yaw_goal = -self.yaw_goal  # for as long
        else:
            turning = rng.random() < 0.4
            self.yaw_goal = float(rng.choice((-1, 1)) * rng.uniform(0.3, self.FASTEST)) if turning else 0.0
            self.turn_frames = int(rng.integers(8, 25))
        self.turn_left = self.turn_frames
        if self.looks_up_and_down:
            self.pitch_goal = float(rng.uniform(-0.4, 0.4)) if rng.random() < 0.25 else -0.05 * self.view_pitch

    def _away_from_walls(self, depth: np.ndarray) -> float:
        h, w = depth.shape
        band = depth[int(0.4 * h) : int(0.6 * h)]
        near = np.percentile(band[:, int(0.3 * w) : int(0.7 * w)], 20)
        if "forward" not in self.keys or near >= 11:
            self.avoiding = 0.0
            return self.yaw_goal
        # Once chosen, the side is kept, or the view would tremble in corners.
        self.avoiding = self.avoiding or float(np.sign(band[:, w // 2 :].mean() - band[:, : w // 2].mean()) or 1.0)
        return self.FASTEST * self.avoiding


def record_episodes(config: RecordConfig) -> int:
    """Plays and writes the episodes that `out` lacks, so a run started again goes on; returns how many.

    Episode i depends on the seed and i alone.
    """
    s3 = storage.is_s3(config.out)
    import_vizdoom()  # before anything is written
    level_wad(config)  # so, too, is a level refused that is not there
    folder = cache.run_folder(config.out) if s3 else Path(config.out)
    with sole_writer(folder, "record", config.out):
        todo = [i for i in range(config.episodes) if not _is_complete(config, i)]
        names = {f"{_folder(config, i).name}/" for i in todo}
        shares = [(config, todo[worker :: config.workers]) for worker in range(min(config.workers, len(todo)))]
        with (
            spawn_workers(_record_share, shares) as workers,
            tqdm(total=len(todo), desc="record", unit="episode", disable=None) as bar,
        ):
            while any([worker.is_running() for worker in workers]):
                time.sleep(2.0 if s3 else 0.2)
                bar.update(len(names.intersection(storage.list_folder(config.out))) - bar.n)
    return len(todo)


def _folder(config: RecordConfig, index: int) -> Path:
    return storage.path(config.out) / f"episode_{index:05d}"


def _record_share(config: RecordConfig, indices: list[int]) -> None:
    with running_game(config) as game:
        for i in indices:
            frames, keyboard, mouse_deg = zip(*play(game, config, i), strict=True)
            actions = np.stack(keyboard), np.stack(mouse_deg)
            write_episode(_folder(config, i), _about(config, i), frames, *actions, CRF)


def import_vizdoom() -> Any:
    """The optional package; refused with what to install."""
    try:
        return importlib.import_module("vizdoom")
    except ImportError as error:
        raise UserError("recording needs ViZDoom: pip install 'worldloom[demo]'") from error


@contextmanager
def running_game(config: RecordConfig) -> Iterator[Any]:
    """A ViZDoom game without window, sound, monsters or weapon, with the depth buffer; closed at the end."""
    vizdoom = import_vizdoom()
    buttons = [*(BUTTONS[key] for key in config.game.action_space.keys), "LOOK_UP_DOWN_DELTA", "TURN_LEFT_RIGHT_DELTA"]
    with tempfile.TemporaryDirectory() as scratch:
        game = vizdoom.DoomGame()
        (wad := Path(scratch) / "level.wad").write_bytes(level_wad(config))
        game.set_doom_scenario_path(str(wad))
        game.set_doom_map(config.level.partition(":")[2] or MAP)
        game.set_doom_config_path(os.path.join(scratch, "vizdoom.ini"))  # else it is written into the working folder
        game.set_screen_resolution(_screen_resolution(vizdoom, config.game))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_depth_buffer_enabled(True)
        # How the weapon is raised depends on the episode before; without it, an episode depends on its seed alone.
        for part in ("hud", "weapon", "crosshair", "messages", "screen_flashes"):
            getattr(game, f"set_render_{part}")(False)
        game.set_window_visible(False)
        game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
        variables = vizdoom.GameVariable
        game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y, variables.ANGLE])
        game.add_game_args("-nomonsters +viz_nocheat 0")
        # The game writes there; if it cannot make the folder, or another game makes it just then, the library crashes.
        Path("_vizdoom").mkdir(exist_ok=True)
        try:
            game.init()
            yield game
        except (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException) as error:
            raise game_ended(str(error)) from error
        finally:
            game.close()


def level_wad(config: RecordConfig) -> bytes:
    """The file of the level, ours or one of ViZDoom's scenarios."""
    if config.level == HALL:
        return write_wad()
    folder, (name, _, level_map) = Path(import_vizdoom().scenarios_path), config.level.partition(":")
    if not (folder / name).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("*.wad")))
        raise UserError(f"ViZDoom has no scenario {name}; there are: {there}")
    wad = (folder / name).read_bytes()
    if level_map.upper().encode().ljust(8, b"\0") not in wad:  # the game would play Freedoom's of that name
        raise UserError(f"{name} has no map {level_map}; most scenarios' is map01")
    return wad


def play(game: Any, config: RecordConfig, index: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each frame (h w 3) of an episode with the keys (k) 0 or 1 and pitch and yaw (2) in degrees until the next one."""
    rng = np.random.default_rng((config.seed, index))
    game.set_seed(int(rng.integers(2**31)))
    game.new_episode()
    game.send_game_command("god")
    space, before = config.game.action_space, None
    explorer, names = Explorer(rng, space.pitch), space.keys
    still = [0.0] * (len(names) + 2)
    game.make_action(still, WARM_UP_TICS)
    if config.level == HALL:
        x, y = random_start(rng)
        game.send_game_command(f"warp {x} {y}")
        game.make_action([*still[:-1], float(rng.uniform(-180, 180))], 1)
        game.make_action(still, WARM_UP_TICS)
    tics = round(TICS_PER_S / config.game.fps)  # per frame
    for _ in range(config.frames):
        state = game.get_state()
        position = np.array(state.game_variables[:2])
        speed = 0.0 if before is None else float(np.linalg.norm(position - before)) / tics
        keys, pitch, yaw = explorer.policy(state.depth_buffer, speed)
        keyboard = np.array([name in keys for name in names], dtype=np.uint8)
        frame = fit_frame(state.screen_buffer, config.game.height, config.game.width)
        yield frame, keyboard, tics * np.array([pitch, yaw]) + 0.0
        game.make_action([*map(int, keyboard), pitch, yaw], tics)
        before = position


def _about(config: RecordConfig, index: int) -> dict[str, Any]:
    facts = {"seed": config.seed, "index": index, "recorder": {"level": config.level, "crf": CRF}}
    facts["licence"] = OURS if config.level == HALL else FREEDOOM
    return describe_episode(config.game, config.frames) | facts


def _is_complete(config: RecordConfig, index: int) -> bool:
    """Whether the episode is there; one that was recorded with other settings is refused, not replaced."""
    folder = _folder(config, index)
    if not (folder / ABOUT).is_file() and (storage.is_s3(folder) or not folder.exists()):
        return False
    missing = [name for name in (ABOUT, VIDEO, ACTIONS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; delete it, and it is recorded again")
    about = parse_object((folder / ABOUT).read_bytes(), folder / ABOUT)
    for key, value in _about(config, index).items():
        if about.get(key) != value:
            raise UserError(f"{folder} was recorded with {key} {about.get(key)!r}, not {value!r}; give another out=")
    return True


def _screen_resolution(vizdoom: Any, game: GameConfig) -> Any:
    """The smallest rendered size that is at least twice the game's in each direction, else the largest."""
    names = [name for name in dir(vizdoom.ScreenResolution) if name.startswith("RES_")]
    sizes = sorted(tuple(map(int, name.removeprefix("RES_").split("X"))) for name in names)
    wide = [(w, h) for w, h in sizes if w >= 2 * game.width and h >= 2 * game.height and 1.5 < w / h < 1.8]
    w, h = wide[0] if wide else (1280, 800)
    return getattr(vizdoom.ScreenResolution, f"RES_{w}X{h}")
