"""What can be wrong with recordings, in words: what it is, and what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.game import GameConfig
from data_pipeline.doctor.signals import RecordingSignals
from data_pipeline.readers import READERS, Reader

Fault = Literal[
    "unreadable", "short", "untold", "shift", "rate", "swapped axes", "inverted", "units", "unrelated", "repeats",
    "still picture", "constant inputs", "dead input", "no effect", "swapped keys", "copy",
    "damaged", "uneven times", "cropped", "shown otherwise",
]  # fmt: skip
NAMED = 6  # recordings; of more their number is said


@dataclass(frozen=True)
class Finding:
    """What is wrong with which recordings, and what to do."""

    fault: Fault
    recordings: tuple[str, ...]
    what: str
    remedy: str
    harmful: bool = True  # to training; else it is worth a look
    confidence: float | None = None  # in [0, 1], that it is so; where it was measured

    def describe(self, total: int) -> str:
        """One line; `total` is the number of all recordings."""
        sure = "" if self.confidence is None else f" (confidence {self.confidence:.1%})"
        level = "" if self.harmful else "note: "
        return f"{name_recordings(self.recordings, total)}: {level}{self.what}{sure}; {self.remedy}"


@dataclass(frozen=True)
class Case:
    """Recordings with what is known of them."""

    recordings: tuple[RecordingSignals, ...]
    game: GameConfig
    reader: Reader

    @property
    def frames(self) -> list[int]:
        return [one.frames for one in self.recordings]

    def find(
        self, fault: Fault, numbers: Iterable[int], words: tuple[str, str], confidence: float | None = None
    ) -> Finding:
        """Something harmful in the recordings of these numbers."""
        return Finding(fault, tuple(self.recordings[i].name for i in numbers), *words, confidence=confidence)

    def note(self, fault: Fault, numbers: Iterable[int], words: tuple[str, str]) -> Finding:
        """Something to look at in the recordings of these numbers."""
        return Finding(fault, tuple(self.recordings[i].name for i in numbers), *words, harmful=False)


def name_recordings(names: Sequence[str], total: int) -> str:
    """Their names, or how many they are."""
    if len(names) == total > 1:
        return f"all {total} recordings"
    if len(names) > NAMED:
        return f"{len(names)} of {total} recordings ({', '.join(names[: NAMED - 1])}, ...)"
    return ", ".join(names)


def shifted(late: int, first_entry: int | None = None) -> tuple[str, str]:
    """The inputs are `late` frames late, or early if it is negative; `first_entry` is GF-Minecraft's setting."""
    several = "s" if abs(late) > 1 else ""
    frames, again = f"{abs(late)} frame{several}", "or record again, with one clock for both"
    if late > 0:
        what = f"inputs are {frames} late: what leads from frame i to i + 1 stands in row i + {late}"
        remedy = f"leave out the first {late} row{several} and the last {frames}, {again}"
    else:
        what = f"inputs are {frames} early: what leads from frame i to i + 1 stands in row i - {-late}"
        remedy = f"leave out the first {frames} and the last {-late} row{several}, {again}"
    if first_entry is not None and 0 <= first_entry + late <= 2:
        remedy = f"set game.inputs.first_entry={first_entry + late}"
    return what, remedy


def drifting(rate: float, fps: float) -> tuple[str, str]:
    """`rate` rows pass from picture to picture where one should."""
    remedy = "write down the times of rows and of pictures, and resample the rows by them"
    if abs(rate - 1) < 0.05:
        return f"inputs and pictures drift apart by {(rate - 1) * 60 * fps:+.1f} frames a minute: two clocks", remedy
    if rate > 1:
        what = (
            f"{rate:.2f} rows of inputs pass from picture to picture: pictures are missing, or fps is {fps / rate:.4g}"
        )
    else:
        what = (
            f"{1 / rate:.2f} pictures pass from row to row of the inputs: rows are missing, or at {fps * rate:.4g} Hz"
        )
    return f"{what}, not {fps:g}", remedy


def inverted(axis: Literal["yaw", "pitch"], case: Case) -> tuple[str, str]:
    """The picture moves the wrong way."""
    what = f"{axis} is inverted: " + {"yaw": "above 0 it turns left", "pitch": "above 0 it looks down"}[axis]
    if READERS[case.reader].scaled_mouse:
        degrees = {"yaw": case.game.inputs.yaw_deg, "pitch": case.game.inputs.pitch_deg}[axis]
        return what, f"set game.inputs.{axis}_deg={-degrees:g}"
    return what, f"give {axis} its other sign in the inputs"


def swapped(case: Case) -> tuple[str, str]:
    """What is written as pitch is yaw, and the other way round."""
    what = "axes are swapped: pitch moves the picture sideways, and yaw, if at all, up and down"
    if case.reader == "lerobot":
        return what, f"set game.inputs.axes=[{','.join(reversed(case.game.inputs.axes))}]"
    return what, "exchange pitch and yaw in the inputs"
