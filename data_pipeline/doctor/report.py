"""What the doctor says: a table, what all recordings together show, a line per problem; and all of it as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from configs.cli import table
from data_pipeline.doctor.diagnosis import Diagnosis
from data_pipeline.doctor.effects import KeyEffect
from data_pipeline.doctor.findings import Finding
from data_pipeline.doctor.verdicts import Checked, Verdict
from data_pipeline.motion import WIDTH

SHOWN = 30  # recordings in the table; of more, those with problems
UNTOLD = "cannot tell"


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
        """Table, summary, problems."""
        parts = []
        if self.diagnosis:
            rows = _rows(self.diagnosis, self.findings)
            parts += [table(rows)] if len(rows) > 1 else []
            parts += ["\n".join(["all together:", *_summary(self.diagnosis)])]
        worst_first = sorted(self.findings, key=lambda one: not one.harmful)
        lines = [one.describe(len(self.names)) for one in worst_first]
        many, problems = "s" * (len(self.names) != 1), "s" * (self.harmful != 1)
        count = f"{len(self.names)} recording{many}, {self.harmful or 'no'} problem{problems}"
        return "\n\n".join([*parts, "\n".join([*lines, count])])

    def json(self) -> dict[str, Any]:
        """Plain data. The status of a check is fault, fine or unknown; the amount is in the check's own units."""
        found: dict[str, Any] = {"recordings": list(self.names), "problems": self.harmful}
        found["findings"] = [asdict(one) for one in self.findings]
        if self.diagnosis:
            case, checks = self.diagnosis.case, _checks(self.diagnosis)
            found["together"] = {name: check.whole._asdict() for name, check in checks.items()}
            found["each"] = {
                recording.name: {"frames": recording.frames, "px_per_degree": gain.px if gain else None}
                | {name: check.own[i]._asdict() for name, check in checks.items()}
                for i, (recording, gain) in enumerate(zip(case.recordings, self.diagnosis.gains, strict=True))
            }
            keys = zip(case.game.action_space.keys, self.diagnosis.keys, strict=True)
            found["keys"] = {name: effect._asdict() for name, effect in keys}
        return found


def _checks(diagnosis: Diagnosis) -> dict[str, Checked]:
    """By what their amount counts."""
    checks = {"frames_late": diagnosis.timing.shift, "rows_per_picture": diagnosis.timing.rate}
    if diagnosis.axes:
        swapped, yaw, pitch = diagnosis.axes
        checks |= {"axes_swapped": swapped, "yaw_inverted": yaw, "pitch_inverted": pitch}
    return checks


def _rows(diagnosis: Diagnosis, found: Sequence[Finding]) -> list[list[str]]:
    """A table of the recordings, if there are not too many; else of those with problems."""
    checks = _checks(diagnosis)
    rows = [["recording", "frames", *(name.replace("_", " ") for name in checks), f"px of {WIDTH}/deg", "problems"]]
    recordings = diagnosis.case.recordings
    for i, (recording, gain) in enumerate(zip(recordings, diagnosis.gains, strict=True)):
        faults = sorted({one.fault for one in found if one.harmful and recording.name in one.recordings})
        if faults or len(recordings) <= SHOWN:
            said = [_say(name, check.own[i]) for name, check in checks.items()]
            px = f"{gain.px:+.2f}" if gain else "?"
            rows.append([recording.name, str(recording.frames), *said, px, ", ".join(faults) or "-"])
    return rows


def _say(check: str, verdict: Verdict) -> str:
    if verdict.status == "unknown":
        return "?"
    if check == "frames_late":
        return f"{verdict.amount:+g}" if verdict.amount else "0"
    if check == "rows_per_picture":
        return f"{verdict.amount or 1:.4g}"
    return "yes" if verdict.status == "fault" else "no"


def _summary(diagnosis: Diagnosis) -> list[str]:
    """A line per check."""
    lines = []
    for name, check in _checks(diagnosis).items():
        said = UNTOLD if check.whole.status == "unknown" else _say(name, check.whole)
        sure = f" (confidence {check.whole.confidence:.1%})" if check.whole.confidence else ""
        lines.append(f"  {name.replace('_', ' '):<17} {said}{sure}")
    if diagnosis.gain:
        gain = f"{diagnosis.gain.px:+.2f} px of {WIDTH} to the right per degree of yaw"
        lines.append(f"  {'gain':<17} {gain}")
    names = diagnosis.case.game.action_space.keys
    keys = "; ".join(f"{name} {_say_key(one)}" for name, one in zip(names, diagnosis.keys, strict=True))
    return [*lines, f"  {'keys':<17} {keys}"]


def _say_key(effect: KeyEffect) -> str:
    strength = effect.strongest
    seen = UNTOLD if strength is None else f"effect {strength:.1f} sd"
    return f"{effect.presses} presses, {seen}"
