"""Recordings: what is written is read back, and what is wrong with one is said in one line."""

import shutil

import numpy as np
import psutil
import pytest
from tiny_recordings import FRAMES, draw_frames, end_early, numbered_episode, write_recording
from tiny_videos import copy_packets, numbered_frames, write_foreign

from data_pipeline.readers import Recording, find_recordings, read_game_frames, split_episodes
from data_pipeline.readers.recording import cut_episodes, recording_of
from data_pipeline.readers.worldloom import find_episodes, read_actions, read_episode
from data_pipeline.video import fit_frame, frame_times, read_frames, write_video


def test_a_recording_is_read_back(game, recordings):
    episode = read_episode(recordings / "episode_00002", game)
    frames, keyboard, mouse_deg = draw_frames(game, FRAMES, seed=2)
    assert (episode.id, len(episode.actions)) == ("episode_00002", FRAMES)
    np.testing.assert_array_equal(episode.actions.keyboard, keyboard)
    np.testing.assert_allclose(episode.actions.mouse, mouse_deg / game.action_space.mouse_unit_deg, atol=1e-4)
    decoded = np.stack(list(read_game_frames(episode, game)))
    error = np.square((decoded.astype(float) - frames).mean(axis=-1)).mean()
    assert 10 * np.log10(255**2 / error) > 30  # grey, since H.264 keeps colours at half the resolution


def test_a_row_leads_from_its_frame_to_the_next(game, recordings):
    episode = read_episode(recordings / "episode_00000", game)
    frames = np.stack(list(episode.frames())).astype(float)
    yaw_px = (episode.actions.mouse[:, 1] * game.action_space.mouse_unit_deg).round().astype(int)
    turned = np.flatnonzero(yaw_px[:-1])[:5]
    assert len(turned) == 5
    for i in turned:
        shifts = {s: np.abs(np.roll(frames[i], -s, 1)[:, 4:-4] - frames[i + 1][:, 4:-4]).mean() for s in range(-3, 4)}
        assert min(shifts, key=lambda s: shifts[s]) == yaw_px[i]


def test_episodes_come_by_name_and_unfinished_ones_do_not(recordings, tmp_path):
    assert list(find_episodes(recordings)) == [f"episode_{i:05d}" for i in range(6)]
    (tmp_path / ".episode_00000.tmp").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} holds no"):
        find_recordings("worldloom", tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of recordings"):
        find_episodes(tmp_path / "nowhere")


def test_what_is_no_episode_is_named_once_and_left_out(recordings, tmp_path, capsys):
    shutil.copytree(recordings / "episode_00000", tmp_path / "a")
    shutil.copytree(recordings / "episode_00000", tmp_path / "__MACOSX" / "a", copy_function=lambda *_: None)
    (tmp_path / "__MACOSX" / "a" / "._video.mp4").touch()
    (tmp_path / "a" / "._video.mp4").write_bytes(b"of a Mac")
    (tmp_path / "notes").mkdir()
    for name in (".DS_Store", ".lock", "README.md", "notes/todo.txt"):  # .lock is our own
        (tmp_path / name).touch()
    for _ in range(2):
        assert list(find_episodes(tmp_path)) == ["a"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: left out") and line.endswith(": .DS_Store, README.md, __MACOSX, notes")


@pytest.mark.parametrize("name", ["video.mkv", "Video.MP4", "video.AVI", "VIDEO.mov"])
def test_a_video_may_be_in_any_container_and_case(name, game, recordings, tmp_path):
    shutil.copytree(recordings / "episode_00000", tmp_path / "a")
    (tmp_path / "a" / "video.mp4").unlink()
    container = {"k": "matroska", "A": "avi"}.get(name[-2], "mp4")
    copy_packets(recordings / "episode_00000" / "video.mp4", tmp_path / "a" / name, format=container)
    (recording,) = find_recordings("worldloom", tmp_path)
    (episode,) = recording.read(game)
    assert len(list(episode.frames())) == FRAMES


@pytest.mark.parametrize("name", ["video.mp4", "actions.csv", "episode.json"])
def test_a_file_that_stands_alone_is_an_episode_that_cannot_be_read(name, game, recordings, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(recordings / "episode_00000" / name, tmp_path / "a" / name)
    (recording,) = find_recordings("worldloom", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/a/"):
        recording.read(game)


def test_a_name_that_is_no_text_is_shown_and_refused(game, recordings, tmp_path):
    shutil.copytree(recordings / "episode_00000", tmp_path / "a\udcff")
    (recording,) = find_recordings("worldloom", tmp_path)
    with pytest.raises(ValueError, match=r"a\\udcff' is no name in UTF-8; rename it"):
        recording.read(game)


def test_a_table_that_is_much_longer_than_its_video_is_not_parsed(game, recordings, tmp_path):
    shutil.copytree(recordings / "episode_00000", tmp_path / "a")
    with open(tmp_path / "a" / "actions.csv", "a") as file:
        file.write("x,0,0,0,0,0,0\n" * 50_000)
    with pytest.raises(ValueError, match=r"actions.csv has 50030 rows, .* 30 frames"):
        read_episode(tmp_path / "a", game)


def test_every_nth_episode_is_held_out():
    recordings = [Recording(name, lambda game: [], name) for name in "abcdefg"]
    train, heldout = split_episodes(recordings, 3)
    assert ["".join(one.name for one in part) for part in (train, heldout)] == ["abdeg", "cf"]
    assert split_episodes(recordings, 0) == (recordings, [])
    with pytest.raises(ValueError, match="heldout_every"):
        split_episodes(recordings, 1)


def test_a_video_that_ends_early_though_its_header_is_whole_is_found(game, recordings, tmp_path):
    folder = tmp_path / "episode_00000"
    shutil.copytree(recordings / "episode_00000", folder)
    end_early(folder, share=1.0)
    assert len(list(read_episode(folder, game).frames())) == FRAMES
    end_early(folder)
    with pytest.raises(ValueError, match=r"video.mp4 .*truncated"):
        list(read_episode(folder, game).frames())


def test_a_key_left_out_of_the_action_space_needs_no_column(tmp_path, game):
    path = tmp_path / "actions.csv"
    path.write_text("frame,jump\n0,1\n1,0\n")
    actions = read_actions(path, type(game.action_space)("other", ("jump",), mouse=False))
    assert actions.keyboard.tolist() == [[1], [0]] and actions.mouse.shape == (2, 0)


def test_another_size_is_resized_and_cropped_at_the_centre(game, tmp_path):
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:, 32:96] = 255  # the centre half
    fitted = fit_frame(frame, 32, 48)
    assert fitted.shape == (32, 48, 3)
    assert (fitted[:, 0] == 0).all() and (fitted[:, 8:40] == 255).all() and (fitted[:, -1] == 0).all()
    assert fit_frame(frame, 128, 64).shape == (128, 64, 3)
    wide = type(game)("tiny", game.action_space, game.fps, 64, 48)
    write_recording(tmp_path / "episode", wide)
    frames = list(read_game_frames(read_episode(tmp_path / "episode", game), game))
    assert frames[0].shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("plain.mp4", "libx264", {"bf": "0"}),
        ("reordered.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}),
        ("open.mp4", "libx265", {"x265-params": "open-gop=1:bframes=4:keyint=12:log-level=none"}),
        ("matroska.mkv", "libx264", {"bf": "3"}),
        ("av1.mp4", "libsvtav1", {"preset": "12"}),
    ],
)
def test_a_span_of_a_video_is_what_decoding_all_of_it_gives(name, codec, options, tmp_path):
    """Whatever order the frames are stored in, and wherever the key frames are."""
    write_foreign(tmp_path / name, numbered_frames(40, step=6), codec=codec, options=options)
    whole = list(read_frames(tmp_path / name))
    assert len(whole) == 40
    for start in range(40):
        span = list(read_frames(tmp_path / name, start, min(start + 3, 40)))
        np.testing.assert_array_equal(span, whole[start : start + 3])
    np.testing.assert_allclose(frame_times(tmp_path / name), np.arange(40) / 20, atol=1e-3)
    with pytest.raises(ValueError, match=f"{name} is truncated: 40 of 43"):
        list(read_frames(tmp_path / name, 38, 43))


def test_a_video_that_is_cut_into_parts_is_read_through_once_and_not_for_each_part(tmp_path):
    rng = np.random.default_rng(0)
    write_video(tmp_path / "a.mp4", rng.integers(0, 256, (120, 96, 160, 3), dtype=np.uint8), 10.0)
    size, before = (tmp_path / "a.mp4").stat().st_size, psutil.Process().io_counters().read_chars
    parts = [list(read_frames(tmp_path / "a.mp4", start, start + 2)) for start in range(5, 120, 5)]
    assert size > 1 << 20 and sum(map(len, parts)) == 46
    # Once to learn where the frames are; a part needs its ten frames between key frames, a twelfth, and a little more.
    assert psutil.Process().io_counters().read_chars - before < 8 * size


def test_a_video_that_is_written_anew_is_read_anew(tmp_path):
    for shade in (50, 200):
        write_video(tmp_path / "a.mp4", np.full((shade // 10, 32, 48, 3), shade, np.uint8), 10.0)
        assert len(frame_times(tmp_path / "a.mp4")) == shade // 10
        (frame,) = read_frames(tmp_path / "a.mp4", 3, 4)
        assert abs(int(frame.mean()) - shade) < 5


def test_a_video_without_times_is_refused(tmp_path):
    write_foreign(tmp_path / "bare.h264", numbered_frames(40))
    with pytest.raises(ValueError, match=r"bare.h264 does not say when its frames are shown"):
        next(read_frames(tmp_path / "bare.h264"))


def test_frames_of_one_recording_are_kept_apart_where_they_do_not_follow():
    keep = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1], dtype=bool)
    jumps = np.array([1, 0, 0, 0, 0, 1, 0, 1, 0], dtype=bool)
    recorded = numbered_episode(np.zeros((9, 1), np.float32))

    def cut(keep, jumps):
        episodes = cut_episodes("a", recorded.footage, recorded.actions[: len(keep)], keep, jumps)
        return {episode.id: (episode.first, episode.stop) for episode in episodes}

    assert cut(keep, jumps) == {"a-f000000": (0, 2), "a-f000003": (3, 5), "a-f000005": (5, 6), "a-f000008": (8, 9)}
    assert cut(~keep[2:3], jumps[:1]) == {"a": (0, 1)} and cut(keep[:0], jumps[:0]) == {}
    assert (recording_of("a-f000123"), recording_of("a"), recording_of("a-f12")) == ("a", "a", "a-f12")


def test_a_video_is_written_whole_or_not_at_all(tmp_path):
    def frames():
        yield np.zeros((32, 48, 3), np.uint8)
        raise ValueError("the source broke off")

    with pytest.raises(ValueError, match="broke off"):
        write_video(tmp_path / "a.mp4", frames(), 10.0)
    assert list(tmp_path.iterdir()) == []
