"""Recorded outputs of the reference on disk, and the judgement of ours against them."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

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
        raise ValueError(f"no fixtures in {folder}: pairs of <case>.json and <case>.safetensors are needed")
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
