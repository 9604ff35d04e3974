"""The doctor of recordings: do inputs and pictures go together? Asked before anything is trained on them."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm.contrib.concurrent import thread_map

from configs import storage, within
from configs.errors import UserError, one_line
from configs.files import require_no_folder, require_other_files
from configs.game import GameConfig
from data_pipeline.doctor.alignment import MIN_FRAMES, align, report_alignment, report_unrelated
from data_pipeline.doctor.findings import REMEDIES, Dataset, Finding
from data_pipeline.doctor.keys import measure_keys, report_keys
from data_pipeline.doctor.pictures import find_copies, find_repeats, report_files
from data_pipeline.doctor.signals import RecordingSignals, measure_recording
from data_pipeline.doctor.turns import report_turns
from data_pipeline.readers import Reader, Recording, find_recordings


@dataclass(frozen=True)
class DoctorConfig:
    """`python -m data_pipeline doctor`."""

    game: GameConfig
    source: str  # folder of recordings
    reader: Reader = "worldloom"  # format of the recordings
    out: str | None = None  # file for everything that was measured, as JSON
    clip_frames: int = within(1, 1 << 30, 18)  # as in encode, which leaves shorter episodes out
    fov_deg: float | None = within(20, 150, None)  # the game's horizontal field of view, to check the unit of yaw
    workers: int = within(1, 1024, os.cpu_count() or 1)  # recordings that are read at the same time


@dataclass(frozen=True)
class Report:
    """What was found in a source."""

    names: tuple[str, ...]  # of all its recordings
    findings: list[Finding]
    measured: dict[str, Any]  # plain data of those that are long enough; empty if none is

    @property
    def harmful(self) -> int:
        """How many problems would hurt training."""
        return sum(finding.harmful for finding in self.findings)


def doctor(config: DoctorConfig) -> int:
    """Find what would hurt training in recordings: GAME.yaml source= out=report.json; exit status 1 if there is any"""
    if config.out is not None:
        require_no_folder([config.out])
        require_other_files([config.out], {"source": config.source})
    report = examine(config)
    for finding in sorted(report.findings, key=lambda finding: not finding.harmful):
        print(finding.describe(len(report.names)))
    many, problems = "s" * (len(report.names) != 1), "s" * (report.harmful != 1)
    print(f"{len(report.names)} recording{many}, {report.harmful or 'no'} problem{problems}")
    if config.out is not None:
        facts = {"recordings": report.names, "problems": report.harmful, "findings": list(map(asdict, report.findings))}
        storage.write_text(config.out, json.dumps(facts | report.measured, indent=1) + "\n")
    return 1 if report.harmful else 0


def examine(config: DoctorConfig) -> Report:
    """Measures every recording of the source and says what is wrong."""
    recordings = find_recordings(config.reader, config.source)
    bar = {"desc": "doctor", "unit": "recording", "disable": None}
    read = thread_map(lambda it: _read(it, config.game), recordings, max_workers=config.workers, **bar)
    findings = [result for result in read if isinstance(result, Finding)]
    data = Dataset([result for result in read if isinstance(result, RecordingSignals)], config.game, config.reader)
    findings += report_files(data, config.clip_frames)
    long_enough = [it for it in data.recordings if any(len(episode) >= MIN_FRAMES for episode in it.episodes)]
    more, measured = diagnose(replace(data, recordings=long_enough), config.fov_deg) if long_enough else ([], {})
    report = Report(tuple(recording.name for recording in recordings), findings + more, measured)
    if not report.harmful and (not measured or measured["together"]["frames_late"]["status"] == "unknown"):
        what = "whether inputs and pictures go together cannot be told from so little"
        report.findings.append(data.find("untold", range(len(data.recordings)), what, harmful=False))
    return report


def _read(recording: Recording, game: GameConfig) -> RecordingSignals | Finding:
    try:
        return measure_recording(recording, game)
    except (UserError, OSError) as error:
        return Finding("unreadable", (recording.name,), one_line(error), REMEDIES["unreadable"])


def diagnose(data: Dataset, fov_deg: float | None) -> tuple[list[Finding], dict[str, Any]]:
    """All checks of recordings each of which has an episode of MIN_FRAMES and more, and what they measured."""
    moving = np.any([it.joined("yaw_pitch").any(axis=0) for it in data.recordings], axis=0)
    mouse, everyone = bool(moving.any()), range(len(data.recordings))
    (findings, stays), (checks, moments) = find_repeats(data), align(data, mouse)
    findings += report_alignment(data, checks, stays)
    if mouse:
        findings += report_turns(data, checks, named(findings, "still picture"), fov_deg)
        findings += report_unrelated(data, checks, moments, named(findings, "still picture"))
    if data.game.action_space.mouse and not named(findings, "swapped axes"):
        if not moving[0]:
            findings.append(data.find("dead input", everyone, "yaw never moves" if mouse else "the mouse never moves"))
        elif not moving[1] and data.game.action_space.pitch:
            findings.append(data.find("dead input", everyone, "pitch never moves", harmful=False))
    spoilt = named(it for it in findings if it.harmful and len(it.recordings) < len(data.recordings))
    trusted = [
        episode.aligned(int(late))
        for recording, late in zip(data.recordings, checks["frames_late"].amount[1:], strict=True)
        for episode in recording.episodes
        if recording.name not in spoilt
    ]
    keys = measure_keys(data, trusted)
    # With a mouse whose rows are missing, what it does would count as chance, or as what keys do.
    findings += report_keys(data, keys, complete=mouse or not data.game.action_space.mouse)
    findings += find_copies(data)
    together, *rows = [{name: check.row(i) for name, check in checks.items()} for i in range(1 + len(everyone))]
    measured = {
        "together": together,
        "each": {it.name: {"frames": it.frames} | row for it, row in zip(data.recordings, rows, strict=True)},
        "keys": {name: effect._asdict() for name, effect in keys.items()},
    }
    return findings, measured


def named(findings: Iterable[Finding], fault: str | None = None) -> set[str]:
    """The recordings that have findings, of one fault or any."""
    return {name for finding in findings if fault in (None, finding.fault) for name in finding.recordings}
