"""Recordings as recorders really leave them: rounded times, odd headers, frames left out, cuts, files beside them."""

import shutil
from dataclasses import replace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_games import load_game, read_all
from foreign_recordings import draw_play, log_rows, owl_rows, write_event_log, write_lerobot, write_owl, write_table
from tiny_videos import copy_packets, numbered_frames, write_foreign

from data_pipeline.display import _reformatter
from data_pipeline.readers.recording import check_rate, open_video
from data_pipeline.readers.worldloom import read_actions
from data_pipeline.video import frame_times, read_frames


def other_container(video, suffix):
    """The same pictures in another container, instead of it."""
    copy_packets(video, video.with_suffix(suffix))
    video.unlink()
    return video.with_suffix(suffix)


@pytest.mark.parametrize("suffix", [".mkv", ".flv"])
@pytest.mark.parametrize(("reader", "write", "rows"), [("owl_control", write_owl, owl_rows),
                                                       ("event_log", write_event_log, log_rows)])  # fmt: skip
def test_milliseconds_of_a_container_are_no_other_rate(reader, write, rows, suffix, tmp_path):
    play = draw_play(40, 5)
    for kind in ("mp4", "other"):
        folder = tmp_path / kind
        write(folder / "one" if reader == "owl_control" else folder / "one.csv", play, rows(play))
    (video,) = (tmp_path / "other").rglob("*.mp4")
    other_container(video, suffix)
    game = load_game(reader, tmp_path)
    (given,), (copied,) = (read_all(reader, tmp_path / kind, game) for kind in ("mp4", "other"))
    np.testing.assert_array_equal(copied.actions.keyboard, given.actions.keyboard)
    with pytest.raises(ValueError, match=r"runs at (60|59\.9\d+|60\.\d+) fps"):
        check_rate(video, frame_times(video.with_suffix(suffix)), replace(game, fps=50.0))


def test_how_long_the_last_frame_stays_is_no_rate(tmp_path):
    write_table(tmp_path / "one.csv", draw_play(40, 5))
    game = load_game("table", tmp_path)
    copy_packets(tmp_path / "one.mp4", tmp_path / "late.mp4", lambda i, t: t + (0.5 if i == 39 else 0))
    with pytest.raises(ValueError, match=r"its rate varies.*game.inputs.times=resample"):  # and not the header's
        open_video(tmp_path / "late.mp4", game)
    copy_packets(tmp_path / "one.mp4", tmp_path / "even.mkv", lambda i, t: t + 3)
    assert open_video(tmp_path / "even.mkv", game).frames == 40


def test_events_know_the_rate_of_a_video_with_frames_left_out_and_of_a_jittery_one(tmp_path):
    play = draw_play(40, 5)
    write_event_log(tmp_path / "one.csv", play, log_rows(play))
    game = load_game("event_log", tmp_path)
    jitter = np.random.default_rng(0).uniform(-0.4, 0.4, 40) / game.fps
    for name, retime in (("left", lambda i, t: t + i // 5 / game.fps), ("jitter", lambda i, t: t + jitter[i] + 1)):
        copied = copy_packets(tmp_path / "one.mp4", tmp_path / f"{name}.mkv", retime)
        check_rate(copied, frame_times(copied), game)
        with pytest.raises(ValueError, match="runs at"):
            check_rate(copied, frame_times(copied), replace(game, fps=game.fps / 2))


def test_a_table_beside_folders_is_no_recording(tmp_path):
    write_table(tmp_path / "source" / "one" / "log.csv", draw_play(40, 5))
    (tmp_path / "source" / "metadata.csv").write_text("file,licence\none,cc0\n")
    (episode,) = read_all("table", tmp_path / "source", load_game("table", tmp_path))
    assert len(episode.actions) == 40


def test_copies_and_leftovers_of_an_owl_control_log_are_no_recording(tmp_path):
    play = draw_play(40, 5)
    write_owl(tmp_path / "source" / "one", play, owl_rows(play))
    (tmp_path / "source" / "__MACOSX").mkdir()
    shutil.copy(tmp_path / "source" / "one" / "inputs.csv", tmp_path / "source" / "old_inputs.csv")
    (tmp_path / "source" / "__MACOSX" / "._inputs.csv").write_bytes(b"\0\5\x16\7")
    assert len(read_all("owl_control", tmp_path / "source", load_game("owl_control", tmp_path))) == 1


def test_episodes_of_lerobot_may_lie_apart_in_their_video(tmp_path):
    write_lerobot(tmp_path / "lerobot", [draw_play(30, 4)] * 3)
    video, about = (next((tmp_path / "lerobot").rglob(f"{where}/**/file-000.*")) for where in ("videos", "episodes"))
    copy_packets(video, tmp_path / "apart.mp4", lambda i, t: t + (1.025 if i >= 30 else 0)).rename(video)
    rows = pq.read_table(about).to_pylist()
    for column in (name for name in rows[1] if name.endswith("_timestamp")):
        rows[1][column] += 1.025
    pq.write_table(pa.Table.from_pylist(rows), about)
    game = load_game("lerobot", tmp_path)
    first, second, _ = read_all("lerobot", tmp_path / "lerobot", game)
    assert len(first.actions) == len(second.actions) == 30 and len(list(second.frames())) == 30
    with pytest.raises(ValueError, match="runs at 20 fps, the game 'own' at 25"):
        read_all("lerobot", tmp_path / "lerobot", replace(game, fps=25.0))


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_frames_that_a_decoder_leaves_out_move_no_other_to_their_place(suffix, tmp_path):
    whole = write_foreign(tmp_path / f"a.{suffix}", numbered_frames(60), codec="mpeg2video", options={"bf": "2"})
    assert len(list(read_frames(whole))) == 60
    with av.open(str(whole)) as given, av.open(str(tmp_path / f"b.{suffix}"), "w") as container:
        before = given.streams.video[0]
        stream = container.add_stream_from_template(before)
        packets = [packet for packet in given.demux(before) if packet.size]
        second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:  # two frames are behind it, and shown before it, that need what was in front
            packet.stream = stream
            container.mux(packet)
    assert len(frame_times(tmp_path / f"b.{suffix}")) == 60 - second
    with pytest.raises(ValueError, match=r"before its frame 0, which does not come in its place"):
        list(read_frames(tmp_path / f"b.{suffix}", 0, 5))


def test_the_conversion_of_colours_is_set_up_once_for_a_look(tmp_path):
    wide = {"color_primaries": 12, "color_trc": 13, "colorspace": 1, "color_range": 1}  # of a Mac's screen

    def prepare(stream):
        for name, value in wide.items():
            setattr(stream.codec_context, name, value)

    paths = [write_foreign(tmp_path / f"{i}.mp4", numbered_frames(3, step=60), prepare) for i in range(2)]
    _reformatter.cache_clear()
    for path in (*paths, *paths):
        assert [round(float(one.mean()), -1) for one in read_frames(path)] == [0, 60, 120]
    assert _reformatter.cache_info().misses == 1


def test_a_column_without_a_name_is_said(game, tmp_path):
    (tmp_path / "actions.csv").write_text("frame,forward,\n0,1,\n")
    with pytest.raises(ValueError, match=r"columns must be .*''"):
        read_actions(tmp_path / "actions.csv", game.action_space)
