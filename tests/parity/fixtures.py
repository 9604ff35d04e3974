"""Recorded outputs of the reference on disk, their settings as ours, and the judgement of ours against them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from configs import build
from configs.errors import UserError
from model.actions import ActionConfig
from model.config import ActionDiTConfig
from model.inputs import action_windows
from model.layout import latent_ends
from model.weights import load_weights

Verdict = Literal["ok", "FAIL", "differs by design", "not supported"]


@dataclass(frozen=True)
class Fixture:
    """One recorded case: what went in, what came out, and how it was made."""

    case: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    @property
    def tolerance(self) -> float:
        return float(self.meta["tolerance"])

    def outputs(self, prefix: str) -> list[str]:
        """Names of the expected outputs `out.<prefix>...`, without `out.`."""
        names = (name.removeprefix("out.") for name in self.tensors if name.startswith("out."))
        return [name for name in names if name.startswith(prefix)]


@dataclass(frozen=True)
class Row:
    """One output judged."""

    case: str
    output: str
    error: float
    tolerance: float
    verdict: Verdict


Case = Callable[[Fixture], Iterator[Row]]


def judge(fixture: Fixture, output: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> Row:
    """The row of one output: largest absolute difference against `tolerance` (the fixture's by default)."""
    tolerance = fixture.tolerance if tolerance is None else tolerance
    if actual.shape != expected.shape:
        return Row(fixture.case, f"{output} {tuple(actual.shape)}", float("inf"), tolerance, "FAIL")
    error = (actual.detach().double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    return Row(fixture.case, output, error, tolerance, "ok" if error <= tolerance else "FAIL")


def unsupported(fixture: Fixture, output: str) -> Row:
    """The row of an expected output that nothing here can compute yet."""
    return Row(fixture.case, output, float("nan"), fixture.tolerance, "not supported")


def read_fixtures(folder: Path) -> list[Fixture]:
    """Every fixture of `folder`, by name. Raises ValueError where there is none."""
    paths = sorted(path for path in folder.glob("*.json") if path.with_suffix(".safetensors").is_file())
    if not paths:
        raise UserError(f"no fixtures in {folder}: pairs of <case>.json and <case>.safetensors are needed")
    metas = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return [
        Fixture(meta["case"], meta, load_weights(path.with_suffix(".safetensors")), folder)
        for path, meta in metas
        if "case" in meta
    ]


def run_fixture(fixture: Fixture, cases: Mapping[str, Case]) -> list[Row]:
    """The rows of one fixture; outputs (or a whole case) that nothing here can compute are `not supported`."""
    case = next((cases[start] for start in cases if fixture.case.startswith(start)), None)
    rows = list(case(fixture)) if case else []
    seen = {row.output.split(" ")[0] for row in rows}
    missing = [name for name in fixture.outputs("") if name not in seen] or ([] if rows else ["everything"])
    return rows + [unsupported(fixture, name) for name in missing]


def dit_config(given: dict[str, Any], action_blocks: Sequence[int] | None = None) -> ActionDiTConfig:
    """Our settings of a fixture's `config`; the bidirectional reference has an action module in every block."""
    blocks = range(given["num_layers"]) if action_blocks is None else action_blocks
    action = action_config(given["action_config"], list(blocks))
    return build(ActionDiTConfig, known_fields(ActionDiTConfig, given) | {"action": action.__dict__})


def action_config(given: dict[str, Any], blocks: list[int]) -> ActionConfig:
    """Our settings of a fixture's `action_config`."""
    split = {"rope_dim_list": given["mouse_qk_dim_list"]} if "mouse_qk_dim_list" in given else {}
    return build(ActionConfig, {**split, **known_fields(ActionConfig, given), "blocks": blocks})


def known_fields(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the dataclass `cls` has a field for."""
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in given.items() if name in names}


def fixture_windows(actions: Tensor | None, config: ActionConfig, f: int, start: int = 0) -> Tensor | None:
    """Windows (b f window k) of a fixture's actions (b n k) for latent frames from `start` on; None for none."""
    if actions is None:
        return None
    ends = latent_ends("continuous", start + f, config.vae_time_compression_ratio)[start:]
    return action_windows(actions, ends, config.window)
