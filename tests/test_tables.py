"""Videos with a table of one row per frame: columns are found by the names that the game's YAML gives them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_games import load_game, read_all
from foreign_recordings import draw_play, write_rows, write_table

PLAY = draw_play(4, 5)
LISTED = "game.inputs.columns={keys: held, dx: mouse_x, dy: mouse_y}"


def write_source(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A source with a video of 4 frames and its table."""
    write_table(path, PLAY)
    write_rows(path, rows)
    return path.parent


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    """Four rows of nothing, but for `columns`."""
    nothing = {name: [0] * 4 for name in ("w", "s", "a", "d", "click", "mouse_x", "mouse_y")}
    columns = {"frame": list(range(4)), **nothing, **columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("down", [["1", "0", "true", "False"], [True, False, 1, 0.0], ["1.0", "0.0", " TRUE", "0"]])
def test_a_key_s_column_says_0_1_true_or_false(suffix: str, down: list[Any], tmp_path: Path) -> None:
    source = write_source(tmp_path / "set" / f"a.{suffix}", rows(w=down, other=["x", None, 1, ""]))
    (episode,) = read_all("table", source, load_game("table", tmp_path))
    assert episode.actions.keyboard[:, 0].tolist() == [
        float(str(one).strip().lower() in ("1", "1.0", "true")) for one in down
    ]


def test_a_column_may_list_the_keys_that_are_held(tmp_path: Path) -> None:
    game = load_game("table", tmp_path, LISTED)
    texts = ["", "w", "w + a", "['s', 'click']"]
    source = write_source(tmp_path / "csv" / "a.csv", rows(held=texts))
    lists = [None, ["w"], ["w", "a"], '["s", "click"]']
    other = write_source(tmp_path / "jsonl" / "a.jsonl", rows(held=lists))
    for folder in (source, other):
        (episode,) = read_all("table", folder, game)
        held = [[key for key, down in zip("wsadc", row, strict=True) if down] for row in episode.actions.keyboard]
        assert held == [[], ["w"], ["w", "a"], ["s", "c"]]


def test_words_of_a_list_that_hold_no_key_are_refused_or_dropped(tmp_path: Path) -> None:
    source = write_source(tmp_path / "set" / "a.jsonl", rows(held=[["w", "esc"], [], [], []]))
    with pytest.raises(ValueError, match=r"a.jsonl line 1: 'esc' holds no key; bind it"):
        read_all("table", source, load_game("table", tmp_path, LISTED))
    (episode,) = read_all("table", source, load_game("table", tmp_path, LISTED, "game.inputs.others=drop"))
    assert episode.actions.keyboard.sum() == 1


def test_the_mouse_counts_in_the_units_that_are_given(tmp_path: Path) -> None:
    source = write_source(tmp_path / "set" / "a.csv", rows(mouse_x=[100, 0, -7.5, 0], mouse_y=[0, 40, 0, "1e2"]))
    (episode,) = read_all("table", source, load_game("table", tmp_path))
    expected = np.array([[0, 5], [-2, 0], [0, -0.375], [-5, 0]])
    np.testing.assert_allclose(10.0 * episode.actions.mouse, expected, atol=1e-6)


def test_a_recording_may_be_a_folder_of_a_video_and_a_table_of_any_names(tmp_path: Path, capsys) -> None:
    write_table(tmp_path / "set" / "one" / "a.csv", PLAY)
    (tmp_path / "set" / "one" / "a.csv").rename(tmp_path / "set" / "one" / "inputs.csv")
    shutil.copytree(tmp_path / "set" / "one", tmp_path / "set" / "two")
    (tmp_path / "set" / "notes").mkdir()
    game = load_game("table", tmp_path)
    assert [one.id for one in read_all("table", tmp_path / "set", game)] == ["one", "two"]
    assert ": notes" in capsys.readouterr().err
    assert [one.id for one in read_all("table", tmp_path / "set" / "one", game)] == ["one"]
