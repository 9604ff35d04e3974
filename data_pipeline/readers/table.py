"""A video with a table that has one row per frame, by any recorder: `<name>.mp4` and `<name>.csv` or `.jsonl`.

Pairs lie in one folder, or each in a folder of its own, which names it then. Row i is what was done while frame i was
on the screen, so it is action i and leads to frame i + 1; there are as many rows as frames. Columns are found by name:

Keys: `game.inputs.keys` binds keys to columns, which hold 0, 1, true or false; without it a key's column has its name.
Or `game.inputs.columns.keys` names one column that lists what is held: a list in a jsonl, a text such as `w space` or
`["w", "space"]`; its words are bound by `game.inputs.keys`, and others are an error or left out, by `others`.
Mouse: `columns.dx` and `columns.dy` (`dx`, `dy`), to the right and down; a unit is `yaw_deg` and `pitch_deg` degrees.
Frame: `columns.frame`, if it is given, must count up by one from row to row, wherever it begins.

Other columns are not read.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from configs.errors import UserError
from configs.game import GameConfig
from data_pipeline.readers.keys import bind_keys, scale_mouse
from data_pipeline.readers.logs import Row, check_frame_numbers, read_frame_rows
from data_pipeline.readers.recording import Format, cut_episodes, find_pairs_or_folders, open_video, read_pair
from data_pipeline.types import Actions, Episode

WORD = re.compile(r"""[^\s,;+|"'\[\]]+""")  # of a text that lists keys


def read_table(name: str, video: Path, table: Path, game: GameConfig) -> list[Episode]:
    """The one episode of a video and its table."""
    columns, footage = game.inputs.columns, open_video(video, game)
    rows = read_frame_rows(table, footage)
    if "frame" in columns:
        check_frame_numbers(rows, columns["frame"])
    keys = bind_keys(game)
    held = [_listed(row, columns["keys"]) if "keys" in columns else filter(row.down, keys.elements) for row in rows]
    keyboard = np.stack([keys.row(names, row.where) for names, row in zip(held, rows, strict=True)])
    mouse = [columns.get("dy", "dy"), columns.get("dx", "dx")] if game.action_space.mouse else []
    moves = np.array([[row.number(column) for column in mouse] or [0, 0] for row in rows])
    actions = Actions(keyboard, scale_mouse(game, moves, lambda i: f"{rows[i].where}: {', '.join(mouse)}"))
    return cut_episodes(name, footage, actions)


def _listed(row: Row, column: str) -> list[str]:
    value = row.cell(column)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.where}: {column} is {value!r:.80}; it must list the names of keys")
    return WORD.findall(value or "")


FORMAT = Format(partial(find_pairs_or_folders, logs=(".csv", ".jsonl")), partial(read_pair, read_table))
