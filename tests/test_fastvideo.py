"""FastVideo's folders: arrays come out of their pickles, and nothing else does."""

import json
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from foreign_games import GAMES, read_all
from foreign_recordings import draw_play, read_picture, write_fastvideo

from configs import load_config
from configs.game import GameConfig
from data_pipeline.readers.fastvideo import read_npy
from train.codec import CodecTrainConfig


def game(*args: str) -> GameConfig:
    """The game of Matrix-Game 2.0's models as it is shipped, small."""
    small = ["game.height=64", "game.width=112", "source=x", "out=x"]
    return load_config(CodecTrainConfig, [str(GAMES / "universal.yaml"), *small, *args]).game


def test_the_shipped_game_reads_fastvideo_s_rows_in_the_order_of_its_keys_and_units(tmp_path: Path) -> None:
    play = draw_play(80, 4)
    write_fastvideo(tmp_path, {"one": play})
    (episode,) = read_all("fastvideo", tmp_path, game())
    np.testing.assert_array_equal(episode.actions.keyboard, play.keyboard)
    np.testing.assert_allclose(episode.actions.mouse, 0.1 * play.levels, atol=1e-6)
    for i, frame in enumerate(episode.frames()):
        assert read_picture(frame, 4).keyboard.tolist() == play.keyboard[i].tolist()


@pytest.mark.parametrize(("rows", "frames", "length"), [(80, 78, 78), (78, 80, 78), (77, 77, 77), (20, 20, 20)])
def test_rows_or_frames_beyond_the_77_that_fastvideo_takes_may_have_no_counterpart(rows, frames, length, tmp_path):
    write_fastvideo(tmp_path, {"one": draw_play(frames, 4)})
    np.save(tmp_path / "videos" / "one.npy", np.array({"keyboard": np.ones((rows, 4)), "mouse": np.zeros((rows, 2))}))
    (episode,) = read_all("fastvideo", tmp_path, game())
    assert len(episode.actions) == length


def test_a_plain_array_is_the_keyboard_of_a_game_without_a_mouse(tmp_path: Path) -> None:
    write_fastvideo(tmp_path, {"one": draw_play(10, 4)}, plain=True)
    (episode,) = read_all("fastvideo", tmp_path, game("game.action_space.mouse=false"))
    np.testing.assert_array_equal(episode.actions.keyboard, draw_play(10, 4).keyboard)
    with pytest.raises(
        ValueError, match=r"one.npy holds no mouse \(10, 2\), but keyboard \(10, 4\); or set action_spa"
    ):
        read_all("fastvideo", tmp_path, game())


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "|b1", "<i8", "|u1", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_all_kinds_of_numbers_come_out_of_a_pickle(dtype: str, order: Any, tmp_path: Path) -> None:
    rows = {"keyboard": np.eye(5, dtype=dtype, order=order)[:, :4], "mouse": np.zeros((5, 2), order=order)}
    np.save(tmp_path / "a.npy", np.array(rows))
    found = read_npy(tmp_path / "a.npy")
    assert found["keyboard"].dtype == np.dtype(dtype)
    for name in rows:
        np.testing.assert_array_equal(found[name], rows[name])


class Call:
    """What unpickles into the result of a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile(path: Path, data: bytes) -> None:
    """A .npy whose pickle is `data`."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(data)


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n"
HUGE = struct.pack("<Q", 1 << 38)
PICKLES: dict[str, Callable[[Path], bytes]] = {
    "a command": lambda bomb: pickle.dumps(Call(os.system, f"touch {bomb}")),
    "a file": lambda bomb: pickle.dumps({"keyboard": Call(Path.touch, bomb)}),
    "an expression": lambda bomb: pickle.dumps(Call(eval, f"open({str(bomb)!r}, 'w')")),
    "numpy's own door": lambda bomb: b"cnumpy.testing._private.utils\nrunstring\n(S'open(%r, \"w\")'\n}tR." % str(bomb),
    "an attribute": lambda bomb: pickle.dumps(Call(getattr, "", "format")),
    "another class of array": lambda bomb: b"cnumpy\nmemmap\n(S'%b'\ntR." % bytes(bomb),
    "a class for an array's": lambda bomb: ARRAY + b"(cposix\nsystem\n(I0\ntS'b'\ntR.",
    "a changed maker": lambda bomb: ARRAY + b"(NV__class__\ncnumpy\nndarray\ndtb.",
    "a method": lambda bomb: ARRAY + b"(N}V__call__\ncnumpy\ndtype\nstb0cnumpy\nndarray\n.",
    "numbers of another file": lambda bomb: b"Pother\n.",
    "an extension": lambda bomb: b"\x82\x01.",
    "a long array of bytes": lambda bomb: b"\x80\x05\x96" + HUGE + b".",
    "long bytes": lambda bomb: b"\x80\x05\x8e" + HUGE + b".",
    "a far place": lambda bomb: b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a long frame": lambda bomb: b"\x80\x04\x95" + HUGE + b"N.",
    "depth": lambda bomb: b"(" * 100_000 + b"l" * 100_000 + b".",
    "nothing": lambda bomb: b"",
    "no dict": lambda bomb: pickle.dumps([1, 2]),
}


@pytest.mark.parametrize("name", PICKLES)
def test_of_a_hostile_pickle_nothing_runs_and_one_line_is_said(name: str, tmp_path: Path) -> None:
    hostile(tmp_path / "a.npy", PICKLES[name](tmp_path / "exploded"))
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=r"a\.npy") as error:
        read_npy(tmp_path / "a.npy")
    assert not (tmp_path / "exploded").exists() and "\n" not in str(error.value)
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_an_array_of_a_hostile_pickle_is_no_larger_than_its_bytes(tmp_path: Path) -> None:
    whole = pickle.dumps(np.array({"keyboard": np.ones((3, 4))}), protocol=2)
    place = next(at for code, value, at in pickletools.genops(whole) if (code.name, value) == ("BININT1", 3))
    assert place is not None
    spoilt = whole[:place] + b"J" + struct.pack("<i", 2**31 - 1) + whole[place + 2 :]
    hostile(tmp_path / "a.npy", spoilt)
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_npy(tmp_path / "a.npy")


def test_absolute_names_of_another_machine_lead_to_what_lies_in_the_source(tmp_path: Path) -> None:
    write_fastvideo(tmp_path, {"one": draw_play(3, 4)})
    (tmp_path / "merge.txt").write_text("/raid/mg2/videos,/raid/mg2/videos2caption.json\n")
    items = [{"path": "/raid/mg2/videos/one.mp4", "action_path": "/raid/mg2/videos/one.npy"}]
    (tmp_path / "videos2caption.json").write_text(json.dumps(items))
    assert len(read_all("fastvideo", tmp_path, game())) == 1


def test_columns_that_are_not_the_keys_of_the_game_are_refused(tmp_path: Path) -> None:
    write_fastvideo(tmp_path, {"one": draw_play(3, 6)})
    with pytest.raises(ValueError, match=r"one.npy: 6 columns, 4 keys; .*game.inputs.keys"):
        read_all("fastvideo", tmp_path, game())
