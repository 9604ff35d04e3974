"""The recorder, with the real ViZDoom."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from configs import lease, load_config, storage
from configs.cli import run
from configs.errors import UserError
from data_pipeline.__main__ import VERBS
from data_pipeline.level import COLOURS, PILLAR_RADIUS, ZONES, textures
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.worldloom import ABOUT, ACTIONS, VIDEO, find_episodes, read_episode
from data_pipeline.record import Explorer, RecordConfig, play, record_episodes, running_game
from data_pipeline.workers import spawn_workers

DOOM = "configs/games/doom.yaml"
FREEDOOM = ["level=deathmatch.wad:map01", "game.action_space.pitch=true"]


def make_config(out, *args):
    return load_config(RecordConfig, [DOOM, f"out={out}", "episodes=2", "frames=12", "seed=3", *args])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder of two episodes."""
    out = tmp_path_factory.mktemp("doom") / "recordings"
    assert record_episodes(make_config(out)) == 2
    return out


def test_recordings_read_back_as_the_games(recorded):
    game = make_config(recorded).game
    for folder in find_episodes(recorded).values():
        episode = read_episode(folder, game)
        frames = np.stack(list(read_game_frames(episode, game)))
        assert frames.shape == (12, 96, 160, 3) and frames.std() > 10
        assert len(episode.actions) == 12
        assert not episode.actions.mouse[:, 0].any()
        about = json.loads((folder / "episode.json").read_text())
        assert about["recorder"]["level"] == "hall" and "Freedoom" not in about["licence"]


def test_episodes_are_the_same_for_any_number_of_workers(recorded, tmp_path):
    assert record_episodes(make_config(tmp_path, "workers=2")) == 2
    for path in recorded.glob("episode_*/*"):
        assert (tmp_path / path.relative_to(recorded)).read_bytes() == path.read_bytes()


def test_a_scenario_of_vizdoom_s_records_too(tmp_path):
    config = make_config(tmp_path, *FREEDOOM, "episodes=1", "frames=40")
    assert record_episodes(config) == 1
    episode = read_episode(tmp_path / "episode_00000", config.game)
    assert episode.actions.mouse[:, 0].any()
    about = json.loads((tmp_path / "episode_00000" / ABOUT).read_text())
    assert about["recorder"]["level"] == "deathmatch.wad:map01" and "BSD-3-Clause" in about["licence"]


def test_another_level_into_the_same_folder_is_refused(recorded, capsys):
    args = ["episodes=2", "frames=12", "seed=3", FREEDOOM[0]]
    assert "recorder" in refused(capsys, DOOM, f"out={recorded}", *args)


def test_recording_again_keeps_what_is_there_and_makes_the_same_of_what_is_not(recorded):
    before = {path: path.read_bytes() for path in recorded.glob("episode_*/*")}
    assert before[recorded / "episode_00000" / ACTIONS] != before[recorded / "episode_00001" / ACTIONS]
    shutil.rmtree(recorded / "episode_00001")
    assert record_episodes(make_config(recorded)) == 1  # the second episode without the first one before it
    assert {path: path.read_bytes() for path in recorded.glob("episode_*/*")} == before
    assert record_episodes(make_config(recorded)) == 0


def refused(capsys, *args):
    """The one line with which `record` ends."""
    assert run("data_pipeline", VERBS, ["record", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_seed_into_the_same_folder_is_refused(recorded, capsys):
    assert "seed 3, not 4" in refused(capsys, DOOM, f"out={recorded}", "episodes=2", "frames=12", "seed=4")


def test_a_bucket_in_which_another_records_is_refused_and_free_afterwards(bucket_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(lease, "EXPIRED_S", 0.5)
    args = [DOOM, f"out={bucket_folder}", "episodes=1", "frames=2"]
    with lease.sole_writer(tmp_path, "record", bucket_folder):
        assert f"{bucket_folder} is in use by another record" in refused(capsys, *args)
        assert [storage.name_of(url) for url in storage.list_tree(bucket_folder)] == ["record.claim"]
    assert run("data_pipeline", VERBS, ["record", *args]) == 0
    assert list(storage.list_tree(bucket_folder)) == [f"episode_00000/{name}" for name in (ACTIONS, ABOUT, VIDEO)]


def test_yaw_is_what_the_view_turns_by():
    config = make_config("unused", "frames=60")
    with running_game(config) as game:
        seen = [(game.get_state().game_variables[2], mouse_deg[1]) for _, _, mouse_deg in play(game, config, 0)]
    angles, turns = np.array(seen).T
    turned = -((np.diff(angles) + 180) % 360 - 180)  # ANGLE grows to the left
    np.testing.assert_allclose(turned, turns[:-1], atol=0.05)
    assert np.std(turned) > 0.3


def test_turning_round_in_the_hall_shows_every_wall_s_colour():
    """All hues within 25 of 255 in each channel, the walls being lit by their distance."""
    config = make_config("unused")
    with running_game(config) as game:
        game.new_episode()
        for place in ("-128 64", "128 -64"):
            game.send_game_command(f"warp {place}")
        seen = []
        for _ in range(24):
            game.make_action([0] * 5 + [15], 1)
            seen.append(game.get_state().screen_buffer.reshape(-1, 3))
    colours = np.unique(np.concatenate(seen), axis=0).astype(int)
    for wall in ("RED", "ORANGE", "YELLOW", "GREEN", "TEAL", "BLUE", "VIOLET", "PINK"):
        assert abs(colours - COLOURS[wall]).max(axis=1).min() < 25, wall


def test_what_lies_in_memory_beside_a_texture_is_not_seen():
    """With walls of 160 rows single pixels changed when a space was added to the map's text."""
    assert all(rows & (rows - 1) == 0 for rows in (len(picture) for picture in textures().values()))


def test_episodes_in_the_hall_start_in_different_free_places_and_stay_inside():
    config = make_config("unused", "frames=60")
    with running_game(config) as game:
        walks = [[game.get_state().game_variables[:2] for _ in play(game, config, i)] for i in range(4)]
    starts, (x, y) = np.array(walks)[:, 0], np.array(walks).reshape(-1, 2).T
    assert len(np.unique(starts, axis=0)) == 4
    assert (abs(starts) <= (512 - 64, 384 - 64)).all()
    assert (abs(x) < 608).all() and (abs(y) < 480).all() and ((abs(x) < 512) | (abs(y) < 384)).all()
    for _, _, pillar, _ in ZONES:
        assert np.linalg.norm(starts - pillar, axis=1).min() > 64 + PILLAR_RADIUS - 1
        assert np.hypot(x - pillar[0], y - pillar[1]).min() > PILLAR_RADIUS


def test_the_explorer_holds_every_key_alone_and_turns_both_ways():
    explorer = Explorer(np.random.default_rng(0))
    open_space = np.full((20, 32), 50, np.uint8)
    held, yaw = zip(*[explorer.policy(open_space, 5.0)[::2] for _ in range(4000)], strict=True)
    assert all(held.count(keys) > 200 for keys in [("forward",), ("back",), ("left",), ("right",), ()])
    assert -1.5 <= min(yaw) < -1 and 1 < max(yaw) <= 1.5 and yaw.count(0) > 1500


def test_the_explorer_looks_up_and_down_only_in_a_game_with_pitch():
    open_space, pitch = np.full((20, 32), 50, np.uint8), {}
    for looks in (True, False):
        explorer = Explorer(np.random.default_rng(0), looks)
        pitch[looks] = [explorer.policy(open_space, 5.0)[1] for _ in range(400)]
    assert np.std(pitch[True]) > 0.05 and not any(pitch[False])


def test_some_turns_of_the_explorer_are_taken_back():
    """Of the turns that follow one another, a fifth are the turn before them the other way, for as long."""
    explorer, goals = Explorer(np.random.default_rng(0)), [(0.0, 0)]
    for _ in range(8000):
        explorer.policy(np.full((20, 32), 50, np.uint8), 5.0)
        if (explorer.yaw_goal, explorer.turn_frames) != goals[-1]:
            goals.append((explorer.yaw_goal, explorer.turn_frames))
    turns = [pair for pair in pairwise(goals) if pair[0][0]]
    back = [pair for pair in turns if pair[1] == (-pair[0][0], pair[0][1])]
    assert 0.15 < len(back) / len(turns) < 0.3


def test_the_explorer_turns_away_from_a_wall_to_the_open_side():
    explorer = Explorer(np.random.default_rng(0))
    explorer.keys, explorer.keys_left = ("forward",), 1000
    wall = np.full((20, 32), 3, np.uint8)
    wall[:, 24:] = 60
    assert [explorer.policy(wall, 5.0)[2] for _ in range(10)][-1] > 1.4


@pytest.mark.parametrize(
    ("arg", "named"),
    [
        ("game.fps=20", "game.fps"),
        ("game.action_space.keys=[forward,jump]", "jump"),
        ("episodes=0", "episodes=0"),
        ("level=deathmatch", "deathmatch.wad:map01"),
        ("level=hall.wad:map01", "deathmatch.wad"),
        ("level=deathmatch.wad:map09", "no map map09"),
        ("level=../hall.wad:map01", "level=../hall.wad:map01"),
        ("frames=1000000000", "frames=1000000000"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arg, named, tmp_path, capsys):
    assert named in refused(capsys, DOOM, f"out={tmp_path}/out", "episodes=1", "game.action_space.caps=[]", arg)
    assert not list(tmp_path.glob("out/*"))


def test_without_vizdoom_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert "pip install 'worldloom[demo]'" in refused(capsys, DOOM, f"out={tmp_path}/out", "episodes=1")
    assert not (tmp_path / "out").exists()


def test_a_working_folder_that_the_game_cannot_write_into_is_one_line(tmp_path, capsys, monkeypatch):
    doom = Path(DOOM).resolve()
    monkeypatch.chdir(tmp_path)
    Path("_vizdoom").touch()
    assert "_vizdoom" in refused(capsys, str(doom), "out=recordings", "episodes=1")


def running_processes(pid, out):
    """Once episodes of the recorder `pid` are there: its two games, and the two workers that play them."""
    until = time.monotonic() + 200  # on busy cores
    running = {"vizdoom": [], "python": []}
    while len(running["vizdoom"]) < 2 or len(list(out.glob("episode_*"))) < 4:
        assert time.monotonic() < until
        time.sleep(0.01)
        below = psutil.Process(pid).children(recursive=True)
        ours = [process for process in below if "resource_tracker" not in " ".join(process.cmdline())]
        running = {name: [process for process in ours if process.name().startswith(name)] for name in running}
    assert list(map(len, running.values())) == [2, 2]
    return running


@pytest.mark.parametrize("killed", ["vizdoom", "python", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_when_a_recorder_a_worker_or_a_game_ends_nothing_goes_on(killed, tmp_path):
    """A recorder that gets a signal leaves no game behind; when a game or its worker is killed, one line tells."""
    line = [sys.executable, "-m", "data_pipeline", "record", DOOM, "episodes=5000", "frames=12", "workers=2"]
    with subprocess.Popen([*line, f"out={tmp_path}"], stderr=subprocess.PIPE, text=True) as recorder:
        running = running_processes(recorder.pid, tmp_path)
        if killed in running:
            running[killed][0].kill()
        else:
            for _ in range(6):  # Python loses what a signal raises in a destructor: a person presses Ctrl-C again
                recorder.send_signal(killed)
                with suppress(subprocess.TimeoutExpired):
                    recorder.wait(20)
                    break
        _, errors = recorder.communicate(timeout=60)
    if killed in running:
        assert recorder.returncode == 2 and errors.count("\n") == 1 and "was it killed" in errors
    alive, until = running["vizdoom"] + running["python"], time.monotonic() + 20
    while alive and time.monotonic() < until:
        time.sleep(0.1)
        alive = [it for it in alive if it.is_running() and it.status() != psutil.STATUS_ZOMBIE]
    assert not alive


def die_soon() -> None:
    """What a worker does whose game is killed soon after its start, and which then waits for ever, as ViZDoom may."""
    with subprocess.Popen(["sleep", "600"]) as game:
        time.sleep(0.2)
        game.kill()
    time.sleep(600)


def test_a_game_that_is_killed_soon_after_its_start_is_missed():
    with spawn_workers(die_soon, [()]) as (worker,), pytest.raises(UserError, match="was it killed"):
        for _ in range(600):
            assert worker.is_running()
            time.sleep(0.1)
