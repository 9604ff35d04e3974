"""What recordings' files say of their pictures, and what becomes of them: planted, and found by the doctor."""

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_recordings import write_recording
from tiny_videos import add_box, copy_packets

from data_pipeline.doctor.examine import DoctorConfig, examine
from data_pipeline.readers import describe_crop
from data_pipeline.readers.worldloom import read_episode
from data_pipeline.video import write_video


@pytest.fixture
def source(recordings, tmp_path):
    """Three recordings, the middle one to be spoilt."""
    for i in range(3):
        shutil.copytree(recordings / f"episode_{i:05d}", tmp_path / "recordings" / f"episode_{i:05d}")
    return tmp_path / "recordings"


def copy_with(video: Path, prepare) -> None:
    """The same packets in a stream that says something else of how they are to be shown."""
    with av.open(str(video)) as given, av.open(str(video.with_name("copy.mp4")), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        prepare(stream)
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    video.with_name("copy.mp4").rename(video)


def turn(video: Path) -> None:
    copy_with(video, lambda stream: stream.set_display_rotation(90))


def stretch(video: Path) -> None:
    copy_with(video, lambda stream: None)
    add_box(video, struct.pack(">I4sII", 16, b"pasp", 4, 3))


def spoil_pictures(video: Path) -> None:
    data = bytearray(video.read_bytes())
    middle = data.find(b"mdat") + (len(data) - data.find(b"mdat")) // 2
    data[middle : middle + 40] = np.random.default_rng(0).integers(0, 256, 40, dtype=np.uint8).tobytes()
    video.write_bytes(data)


def jitter(video: Path) -> None:
    copy_packets(
        video, video.with_name("copy.mp4"), lambda i, t: t + 0.027 * (0 < i < 29), {"video_track_timescale": "9999"}
    )
    video.with_name("copy.mp4").rename(video)


PLANTED = {
    "turned": (turn, "shown otherwise", "stored pictures are turned by a quarter"),
    "stretched": (stretch, "shown otherwise", "its pixels are 1.33 times as wide as high"),
    "damaged": (spoil_pictures, "damaged", "video.mp4 is damaged"),
    "uneven": (jitter, "uneven times", "frame 1 is shown 0.4"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_a_file_says_or_hides_is_found(name, source, game):
    spoil, fault, said = PLANTED[name]
    clean = examine(DoctorConfig(game, str(source))).findings
    assert not {"shown otherwise", "damaged", "uneven times", "cropped"} & {one.fault for one in clean}
    spoil(source / "episode_00001" / "video.mp4")
    found = [one for one in examine(DoctorConfig(game, str(source))).findings if one.recordings == ("episode_00001",)]
    assert [said in one.what for one in found if one.fault == fault] == [True], found


def test_a_portrait_loses_most_of_its_picture_and_that_is_found_and_said(source, game):
    portrait = replace(game, height=game.width, width=game.height)
    shutil.rmtree(source / "episode_00001")
    write_recording(source / "episode_00001", portrait)
    (found,) = [one for one in examine(DoctorConfig(game, str(source))).findings if one.fault == "cropped"]
    share = (min(game.height, game.width) / max(game.height, game.width)) ** 2
    assert found.recordings == ("episode_00001",) and found.what.startswith(f"{share:.0%} of the picture is kept")
    assert found.harmful == (share < 0.5)
    episodes = [read_episode(folder, game) for folder in sorted(source.iterdir())]
    line = describe_crop(episodes, game)
    assert f"of {game.width}x{game.height} px {share:.0%} is kept (1 episodes)" in line and "\n" not in line
    assert describe_crop(episodes[:1], game) == ""


def test_a_portrait_of_160x96_in_96x160_keeps_36_percent(tmp_path, game):
    write_video(tmp_path / "a.mp4", [np.zeros((160, 96, 3), np.uint8)] * 9, game.fps)
    write_recording(tmp_path / "episode_00000", replace(game, height=160, width=96))
    episode = read_episode(tmp_path / "episode_00000", game)
    assert "of 160x96 px 36% is kept" in describe_crop([episode], replace(game, height=96, width=160))


def test_episodes_shorter_than_a_clip_are_counted(source, game):
    write_recording(source / "episode_00003", game, frames=12)
    found = [one for one in examine(DoctorConfig(game, str(source))).findings if one.fault == "short"]
    assert [one.what for one in found] == ["1 of 4 episodes (12 frames) are shorter than a clip of 18 frames"]
    assert found[0].recordings == ("episode_00003",) and not found[0].harmful
