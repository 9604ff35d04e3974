"""The recorder, with the real ViZDoom."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from configs import lease, load_config, storage
from configs.cli import run
from data_pipeline.__main__ import VERBS
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.worldloom import ABOUT, ACTIONS, VIDEO, find_episodes, read_episode
from data_pipeline.record import Explorer, RecordConfig, play, record_episodes, running_game

DOOM = "configs/games/doom.yaml"


def make_config(out, *words):
    return load_config(RecordConfig, [DOOM, f"out={out}", "episodes=2", "frames=12", "seed=3", *words])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("doom") / "recordings"
    return out, record_episodes(make_config(out))


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_recordings_read_back_as_the_games(recorded):
    out, done = recorded
    game = make_config(out).game
    assert done == 2
    for folder in find_episodes(out).values():
        episode = read_episode(folder, game)
        frames = np.stack(list(read_game_frames(episode, game)))
        assert frames.shape == (12, 96, 160, 3) and frames.std() > 10
        assert len(episode.actions) == 12
        assert "BSD-3-Clause" in json.loads((folder / "episode.json").read_text())["licence"]


def test_recording_again_keeps_what_is_there_and_makes_the_same_of_what_is_not(recorded, tmp_path):
    out, _ = recorded
    before = [digest(folder) for folder in find_episodes(out).values()]
    assert before[0] != before[1]
    for path in (out / "episode_00001").iterdir():
        path.unlink()
    (out / "episode_00001").rmdir()
    assert record_episodes(make_config(out)) == 1  # the second episode without the first one before it
    assert [digest(folder) for folder in find_episodes(out).values()] == before
    assert record_episodes(make_config(out)) == 0


def refused(capsys, *words):
    """The one line with which `record` ends."""
    assert run("data_pipeline", VERBS, ["record", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_seed_into_the_same_folder_is_refused(recorded, capsys):
    out, _ = recorded
    line = refused(capsys, DOOM, f"out={out}", "episodes=2", "frames=12", "seed=4")
    assert "recorded with seed 3, not 4" in line


def test_a_bucket_in_which_another_records_is_refused_and_free_afterwards(bucket_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(lease, "EXPIRED_S", 0.5)
    words = [DOOM, f"out={bucket_folder}", "episodes=1", "frames=2"]
    with lease.sole_writer(tmp_path, "record", bucket_folder):
        assert f"{bucket_folder} is in use by another record" in refused(capsys, *words)
        assert [storage.name_of(url) for url in storage.list_tree(bucket_folder)] == ["record.claim"]
    assert run("data_pipeline", VERBS, ["record", *words]) == 0
    assert list(storage.list_tree(bucket_folder)) == [f"episode_00000/{name}" for name in (ACTIONS, ABOUT, VIDEO)]


def test_yaw_and_pitch_are_what_the_view_turns_by():
    config = make_config("unused", "frames=60")
    with running_game(config) as game:
        angles, turns = [], []
        for _, _, mouse_deg in play(game, config, 0):
            angles.append(game.get_state().game_variables[2])
            turns.append(mouse_deg[1])
    turned = -((np.diff(angles) + 180) % 360 - 180)  # ANGLE grows to the left
    np.testing.assert_allclose(turned, turns[:-1], atol=0.05)
    assert np.std(turned) > 0.3


def test_the_explorer_holds_every_key_alone_and_turns_both_ways():
    explorer = Explorer(np.random.default_rng(0))
    open_space = np.full((20, 32), 50, np.uint8)
    held, yaw = zip(*[explorer.policy(open_space, 5.0)[::2] for _ in range(4000)], strict=True)
    assert all(held.count(keys) > 200 for keys in [("forward",), ("back",), ("left",), ("right",), ()])
    assert min(yaw) < -1 and max(yaw) > 1 and yaw.count(0) > 1000


def test_the_explorer_turns_away_from_a_wall_to_the_open_side():
    explorer = Explorer(np.random.default_rng(0))
    explorer.keys, explorer.keys_left = ("forward",), 1000
    wall = np.full((20, 32), 3, np.uint8)
    wall[:, 24:] = 60
    assert [explorer.policy(wall, 5.0)[2] for _ in range(10)][-1] > 1.5


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("game.fps=20", "game.fps"),
        ("game.action_space.keys=[forward,jump]", "jump"),
        ("game.height=160000", "height"),
        ("game.fps=0.000001", "fps"),
        ("episodes=0", "episodes=0 must lie between 1 and 100000"),
        ("episodes=1000000000", "episodes=1000000000 must lie between 1 and 100000"),
        ("frames=1000000000", "frames=1000000000 must lie between 2 and 100000"),
        ("workers=-1", "workers=-1 must lie between 1 and 256"),
        ("frmes=3", "did you mean 'frames'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(word, named, tmp_path, capsys):
    assert named in refused(capsys, DOOM, f"out={tmp_path}/out", "episodes=1", "game.action_space.caps=[]", word)
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


RECORDING = (DOOM, "episodes=500", "frames=12", "workers=2")


def running_processes(pid, out):
    """Once episodes of the recorder `pid` are there: its two games, and the two workers that play them."""
    until = time.monotonic() + 60
    running = {"vizdoom": [], "python": []}
    while len(running["vizdoom"]) < 2 or len(list(out.glob("episode_*"))) < 4:
        assert time.monotonic() < until
        time.sleep(0.01)
        below = psutil.Process(pid).children(recursive=True)
        ours = [process for process in below if "resource_tracker" not in " ".join(process.cmdline())]
        running = {name: [process for process in ours if process.name().startswith(name)] for name in running}
    assert list(map(len, running.values())) == [2, 2]
    return running


def has_ended(process):
    """Also if its parent has not waited for it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("name", ["vizdoom", "python"])
def test_when_a_game_or_its_worker_is_killed_one_line_tells_and_no_other_goes_on(name, tmp_path, capsys):
    started = []

    def kill_one():
        running = running_processes(os.getpid(), tmp_path)
        started.extend(running["vizdoom"] + running["python"])
        running[name][0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    line = refused(capsys, *RECORDING, f"out={tmp_path}")
    killer.join()
    assert "was it killed" in line and "Run the same command to go on" in line
    assert len(started) == 4 and all(map(has_ended, started))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_recorder_that_ends_leaves_no_game_behind(number, tmp_path):
    line = [sys.executable, "-m", "data_pipeline", "record", *RECORDING, f"out={tmp_path}"]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as recorder:
        running = running_processes(recorder.pid, tmp_path)
        os.kill(recorder.pid, number)
        recorder.wait(10)
    started, until = running["vizdoom"] + running["python"], time.monotonic() + 20
    while not all(map(has_ended, started)) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(has_ended, started))
