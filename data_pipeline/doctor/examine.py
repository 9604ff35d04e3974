"""Recordings examined before anything is trained on them: do inputs and pictures go together?"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from configs import storage
from configs.errors import UserError, one_line
from configs.files import require_no_folder, require_other_files
from configs.game import GameConfig
from data_pipeline.doctor.alignment import LEAST
from data_pipeline.doctor.diagnosis import diagnose
from data_pipeline.doctor.findings import Case, Fault, Finding
from data_pipeline.doctor.pictures import report_lengths, report_pictures
from data_pipeline.doctor.report import Report
from data_pipeline.doctor.signals import RecordingSignals, measure_recording
from data_pipeline.packets import DamagedVideoError
from data_pipeline.readers import Reader, Recording, find_recordings
from data_pipeline.readers.recording import UnevenTimesError


@dataclass(frozen=True)
class DoctorConfig:
    """`python -m data_pipeline doctor`."""

    game: GameConfig
    source: str  # folder of recordings
    reader: Reader = "worldloom"  # format of the recordings
    out: str | None = None  # file for everything that was measured, as JSON
    clip_frames: int = 18  # that encode will be told; shorter episodes are left out there
    fov_deg: float | None = None  # the game's horizontal field of view, to check the unit of yaw
    workers: int = os.cpu_count() or 1  # recordings that are read at the same time

    def __post_init__(self) -> None:
        if self.fov_deg is not None and not 20 <= self.fov_deg <= 150:
            raise UserError(f"fov_deg={self.fov_deg:g} must be from 20 to 150, the horizontal field of view in degrees")
        if min(self.workers, self.clip_frames) < 1:
            raise UserError(f"workers={self.workers} and clip_frames={self.clip_frames} must be 1 or more")


def doctor(config: DoctorConfig) -> int:
    """Find what would hurt training in recordings: GAME.yaml source= out=report.json; exit status 1 if there is any"""
    if config.out is not None:
        require_no_folder([config.out])
        require_other_files([config.out], {"source": config.source})
    report = examine(config)
    print(report.text())
    if config.out is not None:
        storage.write_text(config.out, json.dumps(report.json(), indent=1) + "\n")
    return 1 if report.harmful else 0


def examine(config: DoctorConfig) -> Report:
    """Measures every recording of the source and says what is wrong."""
    recordings = find_recordings(config.reader, config.source)
    signals, findings = read_signals(recordings, config.game, config.workers)
    long_enough = tuple(one for one in signals if one.longest >= LEAST)
    short = tuple(one.name for one in signals if one.longest < LEAST)
    if short:
        findings.append(Finding("short", short, f"fewer than {LEAST} frames", "leave them out", harmful=False))
    findings += [*report_pictures(signals, config.game), *report_lengths(signals, config.clip_frames)]
    case = Case(long_enough, config.game, config.reader)
    diagnosis = diagnose(case, config.fov_deg) if long_enough else None
    findings += diagnosis.findings if diagnosis else []
    untold = diagnosis is None or diagnosis.timing.shift.whole.status == "unknown"
    if untold and not any(one.harmful for one in findings):
        names = tuple(one.name for one in signals)
        fault = "whether inputs and pictures go together cannot be told from so little"
        findings.append(Finding("untold", names, fault, "examine longer recordings or more of them", harmful=False))
    return Report(tuple(one.name for one in recordings), diagnosis, findings)


def read_signals(
    recordings: Sequence[Recording], game: GameConfig, workers: int
) -> tuple[list[RecordingSignals], list[Finding]]:
    """The signals of all recordings in order; a finding for each one that cannot be read."""
    signals, findings = [], []
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="read") as pool,
        tqdm(total=len(recordings), desc="doctor", unit="recording", disable=None) as bar,
    ):
        try:
            for read in pool.map(partial(_read, game=game), recordings):
                (findings if isinstance(read, Finding) else signals).append(read)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return signals, findings


def _read(recording: Recording, game: GameConfig) -> RecordingSignals | Finding:
    try:
        return measure_recording(recording, game)
    except (UserError, OSError) as error:
        faults: dict[type[Exception], Fault] = {DamagedVideoError: "damaged", UnevenTimesError: "uneven times"}
        return Finding(
            faults.get(type(error), "unreadable"), (recording.name,), one_line(error), "mend it or leave it out"
        )
