"""Good recordings that are unlike the simplest ones, as the recorders' own sources and data sets have them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from foreign_games import load_game, read_all, require_agreement
from foreign_recordings import (
    Play,
    change_lines,
    draw_gf_play,
    draw_play,
    gf_entries,
    write_csgo,
    write_frames,
    write_gf,
    write_lerobot,
    write_vpt,
)

from data_pipeline.doctor.examine import DoctorConfig, examine
from data_pipeline.readers import find_recordings, split_episodes
from data_pipeline.readers.recording import say
from data_pipeline.video import write_video


def read_vpt(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> list[int]:
    """The lengths of the episodes of 20 frames whose lines were changed; their pictures show their actions."""
    write_vpt(folder / "vpt", "one", draw_play(20, 9))
    change_lines(folder / "vpt" / "one.jsonl", change)
    game = load_game("vpt", folder)
    episodes = read_all("vpt", folder / "vpt", game)
    require_agreement("vpt", game, episodes)
    return [len(episode.actions) for episode in episodes]


def tick(ms: int) -> Callable[[list[dict[str, Any]]], object]:
    """Tick 7 took `ms` instead of 50."""
    return lambda lines: [line.update(milli=line["milli"] + ms - 50) for line in lines[7:]]


@pytest.mark.parametrize(
    ("change", "lengths"),
    [
        (lambda lines: lines.pop(), [19]),  # the last frame then has no action
        (lambda lines: lines[7].update(mouse=None), [7, 12]),
        (lambda lines: lines[7].update(keyboard=None), [7, 12]),
        (lambda lines: lines[7]["mouse"].update(dx=-1201.0), [7, 12]),  # more than half a turn
        (lambda lines: lines[7]["mouse"].update(dx=1e30), [7, 12]),
        *((tick(ms), [7, 13]) for ms in (-40, 19, 101)),
        *((tick(ms), [20]) for ms in (20, 100)),
    ],
)
def test_vpt_is_cut_where_a_line_is_no_action_of_its_frame(change, lengths: list[int], tmp_path: Path) -> None:
    assert read_vpt(tmp_path, change) == lengths


def test_vpt_s_only_frame_needs_a_line_and_lines_beyond_its_frames_are_refused(tmp_path: Path) -> None:
    write_vpt(tmp_path, "one", draw_play(1, 9))
    (tmp_path / "one.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"one.jsonl has 0 rows"):
        read_all("vpt", tmp_path, load_game("vpt", tmp_path))
    with pytest.raises(ValueError, match=r"one.jsonl has 21 rows, .*one.mp4 has 20 frames"):
        read_vpt(tmp_path, lambda lines: lines.append({**lines[-1], "tick": 20, "milli": lines[-1]["milli"] + 50}))


def test_a_video_or_a_log_alone_is_a_bad_recording_beside_good_ones(tmp_path: Path) -> None:
    write_vpt(tmp_path, "b", draw_play(5, 9))
    shutil.copy(tmp_path / "b.mp4", tmp_path / "a.mp4")
    shutil.copy(tmp_path / "b.jsonl", tmp_path / "c.jsonl")
    first, good, last = find_recordings("vpt", tmp_path)
    game = load_game("vpt", tmp_path)
    assert good.name == "b" and len(good.read(game)) == 1
    for bad, path in ((first, "a.mp4"), (last, "c.jsonl")):
        with pytest.raises(ValueError, match=f"{path}: a recording needs one video and one log"):
            bad.read(game)


def test_the_parts_of_a_vpt_session_are_held_out_together(tmp_path: Path) -> None:
    names = [f"shy-red-fox-{session}-20220{day}-101010" for session in ("02e496ce4abb", "f1") for day in (301, 302)]
    names += ["player-20220101-101010", "player-20220102-101010"]
    for name in names:
        for suffix in ("mp4", "jsonl"):
            (tmp_path / f"{name}.{suffix}").touch()
    train, heldout = split_episodes(find_recordings("vpt", tmp_path), 2)
    assert [recording.name for recording in train] == [names[4], *names[:2]]
    assert [recording.name for recording in heldout] == [names[5], *names[2:4]]


def test_gf_minecraft_needs_no_deltas_for_a_game_without_a_mouse(tmp_path: Path) -> None:
    play = draw_gf_play(20)
    keys = [{name: value for name, value in entry.items() if "yaw" not in name and "pitch" not in name}
            for entry in gf_entries(play)[1:-1]]  # fmt: skip
    write_gf(tmp_path, "one", play, [{}, *keys])  # the first entry is to be ignored
    with pytest.raises(ValueError, match=r"entry 1 has no .*pitch_delta"):
        read_all("gf_minecraft", tmp_path, load_game("gf_minecraft", tmp_path))
    game = load_game("gf_minecraft", tmp_path, "game.action_space.mouse=false")
    (episode,) = read_all("gf_minecraft", tmp_path, game)
    assert len(episode.actions) == 19 and episode.actions.mouse.shape == (19, 0)


def pan(folder: Path, late: int) -> None:
    """300 frames of a view that turns by chance, and one entry more; entry i + 1 + `late` leads on from frame i."""
    rng = np.random.default_rng(0)
    levels = rng.integers(-2, 3, 300)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (64, 4096), dtype=np.uint8), (0, 0), 3)
    scene = (4.0 * (scene.astype(float) - 128) + 128).clip(0, 255).astype(np.uint8)
    starts = 2048 + 3 * np.cumsum([0, *levels[:-1]])
    pictures = np.stack([np.repeat(scene[:, at : at + 112, None], 3, axis=2) for at in starts])
    play = Play(np.zeros((300, 7), dtype=int), np.stack([np.zeros(300, dtype=int), levels], axis=1))
    write_gf(folder, "one", play, [*({} for _ in range(late)), *gf_entries(play)][:301])
    write_video(folder / "video" / "one.mp4", pictures, 16.0)


def test_the_doctor_decides_which_entry_of_gf_minecraft_leads_on_from_frame_0(tmp_path: Path, capsys) -> None:
    pan(tmp_path, late=1)
    say.cache_clear()

    def examine_with(*args: str) -> dict[str, str]:
        game = load_game("gf_minecraft", tmp_path, *args)
        report = examine(DoctorConfig(game, str(tmp_path), "gf_minecraft", workers=1))
        return {finding.fault: finding.remedy for finding in report.findings}

    assert examine_with()["shift"] == "set game.inputs.first_entry=2"
    assert "entry 1 is taken to lead on from frame 0" in capsys.readouterr().err
    assert not {"shift", "untold"} & examine_with("game.inputs.first_entry=2").keys()


def test_csgo_is_found_in_the_folders_that_diamond_makes(tmp_path: Path) -> None:
    write_csgo(tmp_path / "full_res" / "1-200" / "hdf5_dm_july2021_1.hdf5", draw_play(3, 13))
    write_csgo(tmp_path / "full_res" / "201-400" / "hdf5_dm_july2021_201.hdf5", draw_play(3, 13))
    names = [recording.name for recording in find_recordings("csgo", tmp_path)]
    assert names == ["hdf5_dm_july2021_1", "hdf5_dm_july2021_201"]
    shutil.copytree(tmp_path / "full_res", tmp_path / "low_res")
    with pytest.raises(ValueError, match=r"full_res/1-200/.* and .*low_res/1-200/.* have the same name"):
        find_recordings("csgo", tmp_path)


def test_csgo_is_cut_where_the_player_dies(tmp_path: Path) -> None:
    write_csgo(tmp_path / "csgo" / "one.hdf5", draw_play(12, 13))
    with h5py.File(tmp_path / "csgo" / "one.hdf5", "a") as file:
        for i in (3, 7, 9):
            del file[f"frame_{i}_helperarr"]
        file["frame_3_helperarr"], file["frame_7_helperarr"] = (1.0, 0.0), (0.0, 1.0)  # a kill, a death
    game = load_game("csgo", tmp_path)
    episodes = read_all("csgo", tmp_path / "csgo", game)
    assert [(episode.id, len(episode.actions)) for episode in episodes] == [("one-f000000", 7), ("one-f000008", 4)]
    require_agreement("csgo", game, episodes)


def test_lerobot_s_action_may_be_called_actions(tmp_path: Path) -> None:
    source = tmp_path / "lerobot"
    write_lerobot(source, [draw_play(6, 4, seed=seed) for seed in range(3)])
    info = source / "meta" / "info.json"
    info.write_text(info.read_text().replace('"action"', '"actions"'))
    for path in source.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([name.replace("action", "actions") for name in table.column_names]), path)
    game = load_game("lerobot", tmp_path)
    episodes = read_all("lerobot", source, game)
    assert len(episodes) == 3
    require_agreement("lerobot", game, episodes)


def read_keys(folder: Path, rows: list[str], frames: int, *args: str) -> list[str]:
    """What is held in each frame, by the letters w, a, s, d; `rows` is the log."""
    shutil.rmtree(folder / "frames", ignore_errors=True)
    write_frames(folder / "frames" / "one", draw_play(frames, 4, mouse=False), ["w", "a", "s", "d"], 20.0, first=0)
    (folder / "frames" / "one" / "input.csv").write_text("\n".join(rows) + "\n")
    (episode,) = read_all("frames", folder / "frames", load_game("frames", folder, *args))
    return ["".join(key for key, held in zip("wsad", row, strict=True) if held) for row in episode.actions.keyboard]


CELLS = [f"{cell},{100 + i / 20},{i}" for i, cell in enumerate(["w", "=", "WA", "A", "W", "sw"])]
ROWS = ["w,0,0", "d,0,0", "W,0.05,1", "=,0.05,1", "a,0.1,2", "s,0.1,2", ",0.1,2", "d,0.1,2"]


@pytest.mark.parametrize(
    ("rows", "args", "held"),
    [
        # Without a header, a cell holds several keys or "=" for none, and a frame's last row counts; else all rows do.
        *((CELLS, [f"game.inputs.others={others}"], ["w", "", "wa", "a", "w", "ws"]) for others in ("refuse", "drop")),
        (ROWS, [], ["d", "", "d"]),
        (["key,time,frame", *ROWS], [], ["wd", "w", "sad"]),
        # To drop other keys never drops a bound one.
        *(([f"{cell},0,0", "d,0.05,1"], ["game.inputs.others=drop"], [keys, "d"]) for cell, keys in (
            ("WQ", "w"), ("qWe", "w"), ("dswa", "wsad"), ("w+a", "wa"), ("W A", "wa"), ("ww", "w"), (" W ", "w"),
            *((cell, "") for cell in ("space", "Shift", "left_control", "up", "jump", " ")),
        )),
    ],
)  # fmt: skip
def test_what_a_key_log_says_is_held(rows: list[str], args: list[str], held: list[str], tmp_path: Path) -> None:
    assert read_keys(tmp_path, rows, len(held), *args) == held


def test_a_word_that_may_be_several_bound_keys_is_refused_even_if_others_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input.csv line 2: 'wheel' may be one key or several"):
        read_keys(tmp_path, ["w,0,0", "wheel,0.05,1"], 2, "game.inputs.others=drop")


def test_what_is_no_recording_beside_folders_of_pictures_is_left_out_and_said(tmp_path: Path, capsys) -> None:
    write_frames(tmp_path / "one", draw_play(3, 4, mouse=False), ["w", "a", "s", "d"], 20.0)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "input.csv").unlink()
    (tmp_path / "__MACOSX").mkdir()
    one, two = find_recordings("frames", tmp_path)
    assert (one.name, two.name) == ("one", "two")  # pictures without a log are a bad recording
    with pytest.raises(FileNotFoundError, match=r"no file .*two/input\.csv"):
        two.read(load_game("frames", tmp_path))
    assert "pictures and input.csv: __MACOSX" in capsys.readouterr().err
