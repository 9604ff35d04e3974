"""Recordings in the formats of others: every frame has the action that its own picture shows."""

import io
import pickle
from pathlib import Path
from typing import get_args

import av
import foreign_recordings as foreign
import numpy as np
import pytest
from foreign_games import LENGTHS, VPT_SPANS, game_args, load_game, read_all, require_agreement, show
from PIL import Image
from tiny_shards import read_clips

import train.codec
from configs import load_config
from configs.cli import run
from data_pipeline.__main__ import VERBS
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from data_pipeline.readers import Reader, find_recordings, keys, owl_control
from data_pipeline.readers.event_rows import held_intervals
from data_pipeline.readers.owl_control import read_events
from data_pipeline.shards import load_manifest
from sampling.trajectories import heldout_episodes
from train.codec import CodecTrainConfig, cut_clips

FOREIGN = [reader for reader in get_args(Reader) if reader != "worldloom"]


@pytest.mark.parametrize("reader", FOREIGN)
def test_every_frame_shows_the_action_that_it_is_given(reader, sources, tmp_path):
    game = load_game(reader, tmp_path)
    episodes = read_all(reader, sources[reader], game)
    assert [len(episode.actions) for episode in episodes] == LENGTHS[reader]
    assert len({episode.id for episode in episodes}) == len(episodes)
    require_agreement(reader, game, episodes)


@pytest.mark.parametrize("reader", FOREIGN)
def test_encoded_clips_have_the_actions_of_their_pictures(reader, sources, codec_folder, tmp_path):
    settings = ["clip_frames=9", "stride=1", "heldout_every=0", f"source={sources[reader]}", f"out={tmp_path}/out"]
    config = load_config(EncodeConfig, [*game_args(reader, tmp_path), f"codec={codec_folder}", *settings])
    encode(config)
    clips = read_clips(tmp_path / "out" / "train" / "manifest.json")
    assert len(clips) == sum(max(0, frames - 8) for frames in LENGTHS[reader])
    episodes = {episode.id: episode for episode in read_all(reader, sources[reader], config.game)}
    for clip in clips:
        keyboard, mouse = show(reader, config.game, np.asarray(Image.open(io.BytesIO(clip.first_frame))))
        assert clip.keyboard[0].tolist() == keyboard
        np.testing.assert_allclose(clip.mouse[0], mouse, atol=1e-5)
        rows = episodes[clip.episode].actions[clip.start : clip.start + 9]
        np.testing.assert_array_equal(clip.keyboard, rows.keyboard)
        np.testing.assert_array_equal(clip.mouse, rows.mouse)


@pytest.mark.parametrize("reader", FOREIGN)
def test_the_codec_is_fitted_to_a_bounded_part_of_each_recording(reader, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(train.codec, "RECORDING_FRAMES", 20)
    more = [f"source={sources[reader]}", f"out={tmp_path}"]
    config = load_config(CodecTrainConfig, [*game_args(reader, tmp_path), *more])
    recordings = find_recordings(reader, sources[reader])
    assert cut_clips(config, recordings).shape == (2 * len(recordings), 9, 64, 112, 3)


def test_the_parts_of_one_recording_are_held_out_together_and_found_again(sources, codec_folder, tmp_path):
    settings = ["clip_frames=9", "heldout_every=2", f"source={sources['vpt']}", f"out={tmp_path}/out"]
    encode(load_config(EncodeConfig, [*game_args("vpt", tmp_path), f"codec={codec_folder}", *settings]))
    train, heldout = (load_manifest(tmp_path / "out" / split / "manifest.json") for split in ("train", "heldout"))
    listed = [episode for shard in train.shards for episode in shard.episodes]
    assert listed == [f"player-20220101-f{first:06d}" for first, end in VPT_SPANS if end - first >= 9]
    assert [episode.id for episode in heldout_episodes(sources["vpt"], "vpt", train)] == listed
    assert [episode.id for episode in heldout_episodes(sources["vpt"], "vpt", heldout)] == ["player-20220102"]


def test_vpt_s_attack_button_counts_only_after_it_is_pressed_anew(tmp_path: Path) -> None:
    """Stuck from the first line on, as in early recordings: pressed at 0, still listed at 1 to 3, pressed anew at 4."""
    play = foreign.draw_play(6, 9)
    play.keyboard[:, 7] = 1
    foreign.write_vpt(tmp_path, "old", play)
    foreign.change_lines(
        tmp_path / "old.jsonl", lambda lines: [lines[i]["mouse"].update(newButtons=[0]) for i in (0, 4)]
    )
    game = load_game("vpt", tmp_path)
    (episode,) = read_all("vpt", tmp_path, game)
    attack = game.action_space.keys.index("attack")
    assert episode.actions.keyboard[:, attack].tolist() == [0, 0, 0, 0, 1, 1]


def test_vpt_s_mouse_keeps_fractions_of_a_degree(tmp_path: Path) -> None:
    foreign.write_vpt(tmp_path, "slow", foreign.draw_play(3, 9))
    foreign.change_lines(tmp_path / "slow.jsonl", lambda lines: lines[1]["mouse"].update(dx=1.0, dy=2.0))
    (episode,) = read_all("vpt", tmp_path, load_game("vpt", tmp_path))
    np.testing.assert_allclose(10.0 * episode.actions.mouse[1], [-0.3, 0.15], atol=1e-6)  # up, right, in degrees


def test_gf_minecraft_s_last_frame_is_kept_if_an_entry_tells_what_was_held_there(tmp_path: Path) -> None:
    play = foreign.draw_gf_play(20)
    foreign.write_gf(tmp_path, "seed_1_part_1", play, foreign.gf_entries(play))
    game = load_game("gf_minecraft", tmp_path)
    episodes = read_all("gf_minecraft", tmp_path, game)
    assert [len(episode.actions) for episode in episodes] == [20]
    require_agreement("gf_minecraft", game, episodes)


def test_csgo_s_pictures_come_as_rgb(sources: dict[str, Path], tmp_path: Path) -> None:
    (episode,) = read_all("csgo", sources["csgo"], load_game("csgo", tmp_path))
    assert next(iter(episode.frames()))[0, 0].tolist() == [255, 0, 0]  # the fixture draws a red line and stores BGR


@pytest.mark.parametrize("reader", FOREIGN)
def test_the_doctor_says_that_a_second_of_play_is_too_little_to_tell(reader, sources, tmp_path, capsys) -> None:
    assert run("data_pipeline", VERBS, ["doctor", *game_args(reader, tmp_path), f"source={sources[reader]}"]) == 0
    said = capsys.readouterr().out
    assert "note: whether inputs and pictures go together cannot be told" in said and "no problems" in said


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    bomb = b"cbuiltins\nopen\n(S'%b'\nS'w'\ntR." % bytes(tmp_path / "exploded")
    play = foreign.draw_play(10, 13)
    foreign.write_csgo(tmp_path / "csgo" / "a.hdf5", play, {"frame_0_meta": np.void(bomb)})
    (tmp_path / "csgo" / "a.npy").write_bytes(bomb)
    (tmp_path / "csgo" / "a.pkl").write_bytes(bomb)
    game = load_game("csgo", tmp_path)
    require_agreement("csgo", game, read_all("csgo", tmp_path / "csgo", game))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it would have


def test_a_frame_without_a_row_holds_nothing_and_numbers_may_begin_anywhere(tmp_path: Path) -> None:
    play = foreign.draw_play(12, 4, mouse=False)
    play.keyboard[3:6] = 0
    foreign.write_frames(tmp_path / "one", play, foreign.INPUTS["frames"], 20.0, first=500)
    game = load_game("frames", tmp_path)
    episodes = read_all("frames", tmp_path / "one", game)  # the folder itself is one recording
    assert [len(episode.actions) for episode in episodes] == [12]
    require_agreement("frames", game, episodes)


def test_a_press_counts_in_the_frames_that_it_fills_by_half_or_in_its_longest() -> None:
    edges = np.arange(6.0)  # frames 0 to 4 of one second each
    presses = {(0.0, 2.0): [0, 1], (0.4, 2.6): [0, 1, 2], (0.6, 2.4): [1], (1.0, 1.0): [1]}
    presses |= {(1.3, 1.4): [1], (0.7, 1.4): [1]}  # taps, one of them over an edge
    presses |= {(-3.0, 0.7): [0], (4.2, 9.0): [4], (-2.0, -1.0): [], (5.0, 6.0): []}
    for (down, up), expected in presses.items():
        assert held_intervals(down, up, edges).tolist() == expected, (down, up)


def test_every_input_that_can_be_bound_in_owl_control_is_delivered_for_some_code(tmp_path: Path) -> None:
    codes = [(kind, code) for kind in ("KEYBOARD", "MOUSE_BUTTON") for code in range(256)]
    foreign.write_owl(
        tmp_path, foreign.draw_play(5, 5), [(1.0, kind, [code, down]) for kind, code in codes for down in (True, False)]
    )
    delivered = {event.value for event in read_events(tmp_path / "inputs.csv")}
    assert delivered >= owl_control.INPUTS
    undelivered = keys.INPUTS - owl_control.INPUTS
    assert undelivered == {"keypad_enter", "keypad_equal", "world_1", "f25", "mouse_6", "mouse_7", "mouse_8"}
    for name in undelivered:
        with pytest.raises(ValueError, match=f"no input '{name}'"):
            read_all("owl_control", tmp_path, load_game("owl_control", tmp_path, f"game.inputs.keys.fire=[{name}]"))


def write_odd_press(reader: str, folder: Path, code: int) -> None:
    """Four frames; in the second, something is held that no usual game uses."""
    play = foreign.draw_play(4, len(foreign.INPUTS[reader]))
    play.keyboard[:] = 0
    if reader == "owl_control":
        rows = foreign.owl_rows(play)
        begin = rows[1][0]
        odd = [(begin + number / 60, "KEYBOARD", [code, number == 1]) for number in (1, 2)]
        foreign.write_owl(folder, play, sorted([*rows, *odd], key=lambda row: row[0]))
    else:
        foreign.write_vpt(folder, "one", play)
        foreign.change_lines(folder / "one.jsonl", lambda lines: lines[1]["mouse"].update(buttons=[code]))


@pytest.mark.parametrize(
    ("reader", "code", "name", "key"),
    [
        ("owl_control", 219, "left_bracket", "fire"),
        ("owl_control", 223, "code_223", "fire"),
        ("vpt", 5, "mouse_6", "attack"),
        ("owl_control", 999, "code_999", None),
        ("vpt", 8, "mouse_9", None),
    ],
)
def test_an_input_that_holds_no_key_can_be_bound_where_the_refusal_advises_it(reader, code, name, key, tmp_path):
    write_odd_press(reader, tmp_path / "source", code)
    advice = "bind it in game.inputs.keys or " if key else ""
    with pytest.raises(ValueError, match=f"'{name}' holds no key; {advice}set game.inputs.others=drop"):
        read_all(reader, tmp_path / "source", load_game(reader, tmp_path, "game.inputs.others=refuse"))
    if key:
        game = load_game(reader, tmp_path, "game.inputs.others=refuse", f"game.inputs.keys.{key}=[{name}]")
        (episode,) = read_all(reader, tmp_path / "source", game)
        assert episode.actions.keyboard[:, game.action_space.keys.index(key)].tolist() == [0, 1, 0, 0]


def test_owl_control_follows_the_times_of_the_video_and_cuts_at_its_gaps(tmp_path: Path) -> None:
    """The capture left out 7 frames behind frame 19: later pictures come 7 / 60 s later than their number says."""
    play = foreign.draw_play(47, 5)
    foreign.write_owl(tmp_path / "one", play, foreign.owl_rows(play))
    pictures = np.delete(foreign.paint(play), np.arange(20, 27), axis=0)
    times = np.delete(np.arange(47), np.arange(20, 27))
    with av.open(str(tmp_path / "one" / "recording.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=60)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = int(time)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    game = load_game("owl_control", tmp_path)
    episodes = read_all("owl_control", tmp_path, game)
    assert [len(episode.actions) for episode in episodes] == [20, 20]
    require_agreement("owl_control", game, episodes)
