"""What the doctor prints: a table, and a line per problem; and all of it as JSON."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from configs.cli import table
from data_pipeline.doctor.findings import CheckResult, Dataset, Finding
from data_pipeline.doctor.keys import KeyEffect
from data_pipeline.motion import WIDTH

SHOWN = 30  # recordings in the table; of more, those with problems


@dataclass(frozen=True)
class Diagnosis:
    """What was measured."""

    data: Dataset
    checks: dict[str, CheckResult]  # by what their amount counts
    px: list[float | None]  # of WIDTH to the right per degree of yaw, of each recording
    keys: list[KeyEffect]


class Report(NamedTuple):
    """Everything about a source."""

    names: tuple[str, ...]  # of all its recordings
    diagnosis: Diagnosis | None  # none if there is no recording to measure
    findings: list[Finding]

    @property
    def harmful(self) -> int:
        """How many problems would hurt training."""
        return sum(one.harmful for one in self.findings)

    def text(self) -> str:
        """Tables of recordings and keys, problems."""
        parts = []
        if self.diagnosis:
            parts = [table(_recordings(self.diagnosis, self.findings)), table(_keys(self.diagnosis))]
        worst_first = sorted(self.findings, key=lambda one: not one.harmful)
        lines = [one.describe(len(self.names)) for one in worst_first]
        many, problems = "s" * (len(self.names) != 1), "s" * (self.harmful != 1)
        lines.append(f"{len(self.names)} recording{many}, {self.harmful or 'no'} problem{problems}")
        return "\n\n".join([*parts, "\n".join(lines)])

    def json(self) -> dict[str, Any]:
        """Plain data. The status of a check is fault, fine or unknown; the amount is in the check's own units."""
        found: dict[str, Any] = {"recordings": list(self.names), "problems": self.harmful}
        found["findings"] = [asdict(one) for one in self.findings]
        if self.diagnosis:
            data, checks = self.diagnosis.data, self.diagnosis.checks
            found["together"] = {name: check.of(0) for name, check in checks.items()}
            found["each"] = {
                recording.name: {"frames": recording.frames, "px_per_degree": px}
                | {name: check.of(1 + i) for name, check in checks.items()}
                for i, (recording, px) in enumerate(zip(data.recordings, self.diagnosis.px, strict=True))
            }
            keys = zip(data.game.action_space.keys, self.diagnosis.keys, strict=True)
            found["keys"] = {name: effect._asdict() for name, effect in keys}
        return found


def _recordings(diagnosis: Diagnosis, findings: list[Finding]) -> list[list[str]]:
    checks, recordings = diagnosis.checks, diagnosis.data.recordings
    heads = [name.replace("_", " ") for name in checks]
    rows = [["recording", "frames", *heads, f"px of {WIDTH}/deg", "problems"]]
    total = sum(one.frames for one in recordings)
    rows.append(["all together", str(total), *(_cell(name, check, 0) for name, check in checks.items()), "", ""])
    for i, (recording, px) in enumerate(zip(recordings, diagnosis.px, strict=True)):
        faults = sorted({one.fault for one in findings if one.harmful and recording.name in one.recordings})
        if faults or len(recordings) <= SHOWN:
            cells = [_cell(name, check, 1 + i) for name, check in checks.items()]
            gain = "?" if px is None else f"{px:+.2f}"
            rows.append([recording.name, str(recording.frames), *cells, gain, ", ".join(faults) or "-"])
    return rows


def _cell(name: str, check: CheckResult, row: int) -> str:
    if check.status[row] == 0:
        return "?"
    if name == "frames_late":
        return f"{check.amount[row]:+g}" if check.amount[row] else "0"
    if name == "rows_per_picture":
        return f"{check.amount[row] or 1:.4g}"
    return "yes" if check.status[row] > 0 else "no"


def _keys(diagnosis: Diagnosis) -> list[list[str]]:
    rows = [["key", "presses", "effect, sd"]]
    for name, effect in zip(diagnosis.data.game.action_space.keys, diagnosis.keys, strict=True):
        rows.append([name, str(effect.presses), "?" if effect.strongest is None else f"{effect.strongest:.1f}"])
    return rows
