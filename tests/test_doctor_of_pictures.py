"""What recordings' files say of their pictures, and what becomes of them: planted, and found by the doctor."""

import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_recordings import spoil_video, write_recording
from tiny_videos import add_box, change_packets

from configs.cli import run
from data_pipeline.__main__ import VERBS
from data_pipeline.doctor.examine import DoctorConfig, examine
from data_pipeline.doctor.findings import Finding
from data_pipeline.readers import describe_crop
from data_pipeline.readers.worldloom import read_episode


@pytest.fixture
def source(recordings, tmp_path):
    """Three recordings, the middle one to be spoilt."""
    for i in range(3):
        shutil.copytree(recordings / f"episode_{i:05d}", tmp_path / "recordings" / f"episode_{i:05d}")
    return tmp_path / "recordings"


def stretch(video: Path) -> None:
    change_packets(video)
    add_box(video, struct.pack(">I4sII", 16, b"pasp", 4, 3))


def jitter(video: Path) -> None:
    change_packets(video, lambda i, t: t + 0.027 * (0 < i < 29), options={"video_track_timescale": "9999"})


PLANTED = {
    "turned": (
        lambda video: change_packets(video, prepare=lambda stream: stream.set_display_rotation(90)),
        "shown otherwise", "stored pictures are turned",
    ),
    "stretched": (stretch, "shown otherwise", "pixels are 1.33 times as wide as high"),
    "truncated": (lambda video: video.write_bytes(video.read_bytes()[:3000]), "unreadable", "is truncated"),
    "damaged": (lambda video: spoil_video(video.parent), "unreadable", "video.mp4 is damaged"),
    "uneven": (jitter, "unreadable", "frame 1 is shown 0.4"),
}  # fmt: skip


def findings(source: Path, game, *faults: str) -> list[Finding]:
    return [finding for finding in examine(DoctorConfig(game, str(source))).findings if finding.fault in faults]


@pytest.mark.parametrize("name", PLANTED)
def test_what_a_file_says_or_hides_is_found(name, source, game, game_yaml, capsys):
    spoil, fault, what = PLANTED[name]
    assert not findings(source, game, "shown otherwise", "unreadable", "cropped")
    spoil(source / "episode_00001" / "video.mp4")
    (finding,) = findings(source, game, fault)
    assert finding.recordings == ("episode_00001",) and what in finding.what
    status = run("data_pipeline", VERBS, ["doctor", game_yaml, f"source={source}"])
    assert what in capsys.readouterr().out and status >= finding.harmful  # turned ones are cropped, too


def test_a_portrait_loses_most_of_its_picture_and_that_is_found_and_said(source, game):
    shutil.rmtree(source / "episode_00001")
    write_recording(source / "episode_00001", replace(game, height=game.width, width=game.height))
    (finding,) = findings(source, game, "cropped")
    share = (min(game.height, game.width) / max(game.height, game.width)) ** 2
    assert finding.recordings == ("episode_00001",) and finding.what.startswith(f"{share:.0%} of the picture is kept")
    assert finding.harmful == (share < 0.5)
    episodes = [read_episode(folder, game) for folder in sorted(source.iterdir())]
    line = describe_crop(episodes, game)
    assert f"of {game.width}x{game.height} px {share:.0%} is kept (1 episodes)" in line and "\n" not in line
    assert describe_crop(episodes[:1], game) == ""


def test_episodes_shorter_than_a_clip_are_counted(source, game):
    write_recording(source / "episode_00003", game, frames=12)
    (finding,) = findings(source, game, "short")
    assert finding.what.startswith("1 of 4 episodes (12 frames)")
    assert finding.recordings == ("episode_00003",) and not finding.harmful
