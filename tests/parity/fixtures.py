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


# What the reference can switch and the released models never do: a fixture that does so cannot be judged.
FIXED = {"model_type": "i2v", "qk_norm": True, "cross_attn_norm": True, "qkv_bias": False}

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
    found = []
    for path in paths:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if "case" in meta:
            found.append(Fixture(meta["case"], meta, load_weights(path.with_suffix(".safetensors")), folder))
    return found


def run_fixture(fixture: Fixture, cases: Mapping[str, Case]) -> list[Row]:
    """The rows of one fixture; outputs (or a whole case) that nothing here can compute are `not supported`."""
    case = next((cases[start] for start in cases if fixture.case.startswith(start)), None)
    rows = list(case(fixture)) if case else []
    seen = {row.output.split(" ")[0] for row in rows}
    missing = [name for name in fixture.outputs("") if name not in seen] or ([] if rows else ["everything"])
    return rows + [unsupported(fixture, name) for name in missing]


def dit_config(given: dict[str, Any], action_blocks: Sequence[int] | None = None) -> ActionDiTConfig:
    """Our settings of a fixture's `config`; the bidirectional reference has an action module in every block."""
    _refuse_other_than_fixed(given)
    blocks = range(given["num_layers"]) if action_blocks is None else action_blocks
    action = action_config(given["action_config"], given["dim"], list(blocks))
    return build(ActionDiTConfig, known_fields(ActionDiTConfig, given) | {"action": action.__dict__})


def action_config(given: dict[str, Any], dim: int, blocks: list[int]) -> ActionConfig:
    """Our settings of a fixture's `action_config`."""
    _refuse_other_than_fixed(given)
    splits = [given[name] for name in ("rope_dim_list", "mouse_qk_dim_list") if name in given]
    if any(split != splits[0] for split in splits) or given.get("img_hidden_size", dim) != dim:
        raise UserError(
            f"fixture with rope splits {splits} and img_hidden_size {given.get('img_hidden_size')}: one each"
        )
    ours = known_fields(ActionConfig, given) | {"blocks": blocks}
    return build(ActionConfig, ours | ({"rope_dim_list": splits[0]} if splits else {}))


def _refuse_other_than_fixed(given: Mapping[str, Any]) -> None:
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise UserError(f"fixture with {name}={given[name]!r}: the model only knows {value!r}")


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
