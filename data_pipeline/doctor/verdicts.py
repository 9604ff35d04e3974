"""What a check says: of each recording by itself, of all together, and of each in the light of all."""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Verdict(NamedTuple):
    """What one check says of a recording, or of all together."""

    status: Literal["fault", "fine", "unknown"]
    amount: float = 0.0  # of the fault, in what the check counts in
    confidence: float = 0.0  # in [0, 1]


UNKNOWN = Verdict("unknown")


class Checked(NamedTuple):
    """What one check says of all recordings together, and of each."""

    whole: Verdict
    own: list[Verdict]

    def without(self, numbers: Collection[int]) -> "Checked":
        """The same, but nothing is said of these recordings."""
        return Checked(self.whole, [UNKNOWN if i in numbers else one for i, one in enumerate(self.own)])

    def faults(self) -> Iterator[tuple[Verdict, list[int]]]:
        """Each fault with the numbers of the recordings that have it."""
        amounts = {one.amount for one in self.own if one.status == "fault"}
        for amount in sorted(amounts):
            having = [i for i, one in enumerate(self.own) if one.status == "fault" and one.amount == amount]
            yield max((self.own[i] for i in having), key=lambda one: one.confidence), having


def decide(evidence: float, odds: float, amount: float = 1.0, confidence: float | None = None) -> Verdict:
    """A fault, none, or what nobody can tell, by the evidence for a fault against none: a natural logarithm of odds."""
    if abs(evidence) < odds:
        return UNKNOWN
    sure = float(1 / (1 + np.exp(-abs(evidence)))) if confidence is None else confidence
    return Verdict("fault", amount, sure) if evidence > 0 else Verdict("fine", 0.0, sure)


def spread(whole: Verdict, own: Sequence[Verdict], near: float = 0.0) -> Checked:
    """What is said of all is said of each one that by itself says nothing, or the same.

    The same is a fault whose amount is not further away than `near`.
    """

    def same(one: Verdict) -> bool:
        return one.status == whole.status and abs(one.amount - whole.amount) <= near

    return Checked(whole, [whole if one.status == "unknown" or same(one) else one for one in own])
