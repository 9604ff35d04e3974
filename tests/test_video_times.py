"""Where rows are paired with frames, the frames come evenly, or are taken by their times."""

from dataclasses import replace

import av
import numpy as np
import pytest
from tiny_recordings import numbered_episode, write_recording
from tiny_videos import copy_packets

from configs.game import InputConfig
from data_pipeline.readers import find_recordings
from data_pipeline.readers.recording import open_video
from data_pipeline.readers.worldloom import read_episode
from data_pipeline.resample import resample
from data_pipeline.video import frame_times, read_frames

FRAMES = 60


@pytest.fixture
def retimed(game, tmp_path):
    """What makes a recording whose frames are shown at other times."""

    def make(retime, suffix="mp4"):
        video = tmp_path / f"episode_of_{suffix}" / "video.mp4"
        write_recording(video.parent, game, frames=FRAMES)
        options = {"video_track_timescale": "100000"} if suffix == "mp4" else {}
        copy_packets(video, tmp_path / f"a.{suffix}", retime, options=options).rename(video)
        return video.parent

    return make


def jitter(i: int, t: float) -> float:
    """47 % of a frame late and early by turns, the first and last not."""
    return t + (0.027 if i % 2 else -0.027) * (0 < i < FRAMES - 1)


def burst(i: int, t: float) -> float:
    """Twenty frames at double speed, then a hole."""
    return t - max(0, min(i, 30) - 10) / 17.5 / 2 * (i < 31)


@pytest.mark.parametrize(
    ("retime", "frame"),
    [(jitter, "frame 1 is shown 0.47 frames late"), (burst, "frame 11 is shown 0.50 frames early")],
)
def test_uneven_frames_are_refused_with_the_first_one_named(retime, frame, retimed, game):
    folder = retimed(retime)
    with av.open(str(folder / "video.mp4")) as container:
        assert container.streams.video[0].average_rate == pytest.approx(game.fps, rel=0.005)
    for read in (lambda: read_episode(folder, game), lambda: open_video(folder / "video.mp4", game)):  # all readers'
        with pytest.raises(ValueError, match=f"video.mp4: {frame}.*game.inputs.times=resample") as error:
            read()
        assert "\n" not in str(error.value)


def test_times_that_a_container_rounds_are_even_and_a_rate_that_only_the_header_says_is_none(retimed, game):
    assert len(read_episode(retimed(lambda i, t: t, "mkv"), game).actions) == FRAMES
    with pytest.raises(ValueError, match=r"runs at 17\.1"):
        read_episode(retimed(lambda i, t: 1.02 * t), game)


def test_uneven_frames_can_be_taken_by_their_times(retimed, game):
    folder = retimed(burst)
    by_time = replace(game, inputs=InputConfig(times="resample"))
    (recording,) = find_recordings("worldloom", folder.parent)
    (episode,) = recording.read(by_time)
    stored, times = list(read_frames(folder / "video.mp4")), frame_times(folder / "video.mp4")
    on_screen = [stored[np.flatnonzero(times <= i / game.fps + 1e-3)[-1]] for i in range(FRAMES)]
    np.testing.assert_array_equal(list(episode.frames()), on_screen)
    whole = read_episode(folder, by_time).actions
    np.testing.assert_allclose(episode.actions.mouse.sum(axis=0), whole.mouse.sum(axis=0), atol=1e-4)


def test_a_frame_that_stays_has_its_movement_in_its_last_row_alone():
    times = np.array([0, 0.1, 0.15, 0.2, 0.5, 0.6])  # frames 1 and 2 share a tenth of a second, frame 3 stays for three
    episode = resample(numbered_episode(np.eye(6, dtype=np.float32)), 10.0, 10.0, times)
    assert [int(frame[0, 0, 0]) for frame in episode.frames()] == [0, 1, 3, 3, 3, 4, 5]
    assert episode.actions.mouse[:, 0].tolist() == [1, 2, 0, 0, 1, 1, 1]
    assert episode.actions.keyboard.argmax(axis=1).tolist() == [0, 1, 3, 3, 3, 4, 5]
    assert episode.actions.keyboard[1].tolist() == [0, 1, 1, 0, 0, 0]


def test_frames_by_time_are_not_invented(retimed, game):
    folder = retimed(lambda i, t: 1.1 * t)
    (recording,) = find_recordings("worldloom", folder.parent)
    with pytest.raises(ValueError, match=r"video.mp4 has 15\.\d+ frames a second, .*game.fps=17.5"):
        recording.read(replace(game, inputs=InputConfig(times="resample")))
