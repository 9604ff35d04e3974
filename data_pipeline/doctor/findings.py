"""What the doctor's checks return: findings in words, and verdicts from log-likelihood ratios."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from configs.game import GameConfig
from data_pipeline.doctor.signals import RecordingSignals
from data_pipeline.readers import Reader

REMEDIES = {  # by fault
    "unreadable": "repair it or leave it out",
    "short": "encode leaves them out: record longer ones or lower clip_frames",
    "untold": "examine longer recordings or more of them",
    "shift": "leave out the rows and frames without a partner, or record again, with one clock for both",
    "rate": "write down the times of rows and of pictures (one clock may be slow), and resample the rows by them",
    "swapped axes": "exchange pitch and yaw in the inputs, or in game.inputs.axes",
    "inverted": "give it the other sign in the inputs, or in game.inputs.yaw_deg or pitch_deg",
    "units": "degrees of another unit or sensitivity, or another fps: fix the inputs",
    "unrelated": "another recording's inputs, or a shift or fps that this one is too short to show: record again",
    "repeats": "record both at the game's fps, or set game.inputs.fps to it and a lower game.fps",
    "still picture": "record again, or cut it out: a black or frozen capture, a menu, a lost focus",
    "constant inputs": "cut them out: a frozen log, a cutscene, a replay",
    "dead input": "bind it, record it, or leave it out of the action space",
    "no effect": "if it should do something, these rows are not that key's: fix its binding",
    "swapped keys": "exchange them in the inputs or in game.inputs.keys",
    "copy": "delete one of them: a held-out copy makes the model look better than it is",
    "cropped": "record in the game's proportions, or set game.height and game.width to the recordings'",
    "shown otherwise": "look at one: a recorder may have said it wrongly",
}
NAMED = 6  # recordings; of more, the number is given


@dataclass(frozen=True)
class Finding:
    """What is wrong with which recordings, and what to do."""

    fault: str  # one of REMEDIES
    recordings: tuple[str, ...]
    what: str
    remedy: str
    harmful: bool = True  # to training; else it is worth a look
    confidence: float | None = None  # in [0, 1], where it was measured

    def describe(self, total: int) -> str:
        """One line; `total` is the number of all recordings."""
        confidence = "" if self.confidence is None else f" (confidence {self.confidence:.1%})"
        count, note = len(self.recordings), "" if self.harmful else "note: "
        names = f"{count} of {total} recordings" if count > NAMED else ", ".join(self.recordings)
        return f"{names}: {note}{self.what}{confidence}; {self.remedy}"


@dataclass(frozen=True)
class Dataset:
    """Recordings of one game."""

    recordings: Sequence[RecordingSignals]
    game: GameConfig
    reader: Reader

    def find(
        self, fault: str, numbers: Iterable[int], what: str, confidence: float | None = None, harmful: bool = True
    ) -> Finding:
        """A finding about the recordings of these numbers."""
        return Finding(
            fault, tuple(self.recordings[i].name for i in numbers), what, REMEDIES[fault], harmful, confidence
        )


@dataclass(frozen=True)
class CheckResult:
    """One check's verdicts: row 0 of all r recordings together, then one row for each."""

    status: np.ndarray  # (1 + r): 1 for a fault, -1 for none, 0 if there is too little to tell
    amount: np.ndarray  # (1 + r), of the fault, in the check's unit
    confidence: np.ndarray  # (1 + r), in [0, 1]

    def faults(self) -> Iterator[tuple[float, list[int], float]]:
        """Amount, numbers of the recordings, and confidence of each fault."""
        faulty = self.status[1:] > 0
        for amount in np.unique(self.amount[1:][faulty]):
            rows = np.flatnonzero(faulty & (self.amount[1:] == amount))
            yield float(amount), rows.tolist(), float(self.confidence[1 + rows].max())

    def row(self, row: int) -> dict[str, str | float]:
        """One row as plain data."""
        status = ("unknown", "fault", "fine")[self.status[row]]
        return {"status": status, "amount": float(self.amount[row]), "confidence": float(self.confidence[row])}
