"""The reference's presets, overlay states and live actions: what `python -m model parity` cannot know by itself."""

from collections.abc import Iterator

import numpy as np
import torch

from data_pipeline.types import Actions
from model.parity import Case, Fixture, Row, judge
from sampling.presets import UPSTREAM_PRESETS, cursor_path, live_rows, lit_keys, preset_actions, replace_rows


def actions(fixture: Fixture) -> Iterator[Row]:
    """Preset sequences by seed, what the overlay shows of them, and actions replaced block by block."""
    for game in UPSTREAM_PRESETS:
        by_seed = [_preset_play(fixture, game, seed) for seed in fixture.meta["seeds"]]
        for play, rows in by_seed:
            yield from rows
        yield from _overlay(fixture, game, [play for play, _ in by_seed if play is not None])
    if "cond_current_lengths" in fixture.meta:
        yield from _live(fixture)


def _preset_play(fixture: Fixture, game: str, seed: int) -> tuple[Actions | None, list[Row]]:
    prefix = f"{game}.seed{seed}."
    expected = fixture.tensors.get(f"{prefix}keyboard_condition")
    if expected is None:
        return None, []
    play = preset_actions(UPSTREAM_PRESETS[game](), len(expected), seed)
    rows = [judge(fixture, f"{prefix}keyboard_condition", torch.from_numpy(play.keyboard), expected)]
    mouse = fixture.tensors.get(f"{prefix}mouse_condition")
    if mouse is not None:
        rows.append(judge(fixture, f"{prefix}mouse_condition", torch.from_numpy(play.mouse), mouse))
    return play, rows


def _overlay(fixture: Fixture, game: str, plays: list[Actions]) -> Iterator[Row]:
    """The fixture does not say whose seed's play it drew: the nearest one counts."""
    for name in [name for name in fixture.tensors if name.startswith(f"overlay.{game}.")]:
        expected = fixture.tensors[name]
        drawn = [cursor_path(play.mouse) if "cursor" in name else lit_keys(game, play) for play in plays]
        rows = [judge(fixture, name, torch.from_numpy(one), expected) for one in drawn]
        yield min(rows, key=lambda row: row.error)


def _live(fixture: Fixture) -> Iterator[Row]:
    """Blocks of actions replaced one after the other in a play of zeros, and what is handed to the model each time."""
    tensors, lengths = fixture.tensors, fixture.meta["cond_current_lengths"]
    after = {name: tensors.get(f"cond_current.{name}_after") for name in ("keyboard", "mouse")}
    keyboard, mouse = (np.zeros((0, 0)) if one is None else np.zeros(one.shape[1:], np.float32) for one in after.values())
    play, start, handed = Actions(keyboard, mouse), 0, []
    for i, (_, latents) in enumerate(lengths):
        held = [tensors.get(f"cond_current.replace_{name}_b{i}") for name in after]
        rows = live_rows(start, len(latents))
        assert held[0] is not None
        play = replace_rows(play, rows, held[0].numpy(), None if held[1] is None else held[1].numpy())
        handed.append([rows.stop, *range(start, start + len(latents))])
        start += len(latents)
    for name, expected in after.items():
        if expected is not None:
            actual = torch.from_numpy(play.keyboard if name == "keyboard" else play.mouse)
            yield judge(fixture, f"cond_current.{name}_after", actual[None], expected)
    expected = torch.tensor([[frames, *latents] for frames, latents in lengths])
    yield judge(fixture, "cond_current_lengths", torch.tensor(handed), expected)


CASES: dict[str, Case] = {"actions": actions}
