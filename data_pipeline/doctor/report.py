"""What the doctor prints: a table, and a line per problem; and all of it as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from configs.cli import table
from data_pipeline.doctor.findings import CheckResult, Dataset, Finding
from data_pipeline.doctor.keys import KeyEffect

SHOWN = 30  # recordings in the table; of more, those with problems


@dataclass(frozen=True)
class Report:
    """Everything about a source."""

    names: tuple[str, ...]  # of all its recordings
    findings: list[Finding]
    data: Dataset | None = None  # the recordings that were measured; what follows is theirs
    checks: dict[str, CheckResult] = field(default_factory=dict)  # by what their amount counts
    keys: list[KeyEffect] = field(default_factory=list)

    @property
    def harmful(self) -> int:
        """How many problems would hurt training."""
        return sum(one.harmful for one in self.findings)

    def text(self) -> str:
        """Tables of recordings and keys, problems."""
        tables = [table(rows) for rows in self._tables(self.data)] if self.data else []
        worst_first = sorted(self.findings, key=lambda one: not one.harmful)
        lines = [one.describe(len(self.names)) for one in worst_first]
        many, problems = "s" * (len(self.names) != 1), "s" * (self.harmful != 1)
        lines.append(f"{len(self.names)} recording{many}, {self.harmful or 'no'} problem{problems}")
        return "\n\n".join([*tables, "\n".join(lines)])

    def _tables(self, data: Dataset) -> tuple[list[list[str]], list[list[str]]]:
        rows = [["recording", "frames", *(name.replace("_", " ") for name in self.checks), "problems"]]
        total = sum(one.frames for one in data.recordings)
        names = [("all together", total), *((one.name, one.frames) for one in data.recordings)]
        for row, (name, frames) in enumerate(names):
            faults = sorted({one.fault for one in self.findings if one.harmful and name in one.recordings})
            if row == 0 or faults or len(data.recordings) <= SHOWN:
                cells = [check.cell(row) for check in self.checks.values()]
                rows.append([name, str(frames), *cells, ", ".join(faults) or "-"])
        keys = [["key", "presses", "effect, sd"]]
        for name, effect in zip(data.game.action_space.keys, self.keys, strict=True):
            keys.append([name, str(effect.presses), "?" if effect.strongest is None else f"{effect.strongest:.1f}"])
        return rows, keys

    def json(self) -> dict[str, Any]:
        """Plain data. The status of a check is fault, fine or unknown; the amount is in the check's own units."""
        found: dict[str, Any] = {"recordings": list(self.names), "problems": self.harmful}
        found["findings"] = [asdict(one) for one in self.findings]
        if self.data:
            found["together"] = {name: check.of(0) for name, check in self.checks.items()}
            found["each"] = {
                one.name: {"frames": one.frames} | {name: check.of(1 + i) for name, check in self.checks.items()}
                for i, one in enumerate(self.data.recordings)
            }
            keys = zip(self.data.game.action_space.keys, self.keys, strict=True)
            found["keys"] = {name: effect._asdict() for name, effect in keys}
        return found
