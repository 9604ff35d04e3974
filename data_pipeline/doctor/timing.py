"""Whether rows and pictures go together in time, in each recording and in all."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from data_pipeline.doctor.alignment import RATES, Clock, Products, align, measure_products, rates_for
from data_pipeline.doctor.signals import RecordingSignals
from data_pipeline.doctor.verdicts import UNKNOWN, Checked, Verdict, decide, spread

# Natural logarithms of odds. Of 500 clean ViZDoom recordings of 6 s the worst had 8.7 for a wrong shift and 9.0 for a
# wrong rate; of 1,000 with another one's inputs, 17 and 25.
SHIFT_ODDS, RATE_ODDS = 12.0, 17.0


@dataclass(frozen=True)
class Timing:
    """How the rows of recordings lie to their pictures."""

    shift: Checked  # frames by which inputs are late
    rate: Checked  # rows per picture
    products: list[Products]  # of each recording, of every shift of one row per picture

    def aligned(self) -> list[Products | None]:
        """The products of each recording at its own shift; none where no shift is right, since the rate is wrong."""
        middle = len(self.products[0].inputs) // 2
        places = [middle + int(shift.amount) for shift in self.shift.own]
        return [
            None if rate.status == "fault" else products[place : place + 1]
            for products, place, rate in zip(self.products, places, self.rate.own, strict=True)
        ]


def time_recordings(recordings: Sequence[RecordingSignals], clock: Clock) -> Timing:
    """All together, and each by itself; every recording has an episode that is long enough."""
    judged, products, summed = [], [], []
    for recording in recordings:
        rates = rates_for(recording.frames)
        measured = measure_products(recording.episodes, clock, rates)
        judged.append(judge(measured, clock, rates))
        products.append(measured[: len(clock.shifts)])
        usual = measured[: len(RATES) * len(clock.shifts)]
        summed = [reduce(Products.__add__, [*summed, usual])]
    shift, rate = judge(summed[0], clock, RATES)
    if rate.status == "fault":  # then a shift is only what fits best for a while
        judged = [(UNKNOWN if one.status == "fault" else one, other) for one, other in judged]
    shifts, own_rates = (list(part) for part in zip(*judged, strict=True))
    return Timing(spread(shift, shifts, near=1), spread(rate, own_rates, near=0.1), products)


def judge(products: Products, clock: Clock, rates: Sequence[float]) -> tuple[Verdict, Verdict]:
    """What is said of the shift and of the rate."""
    found = align(products, clock, rates)
    rate = decide(found.rate_evidence, clock.odds * RATE_ODDS, found.rate)
    if rate.status == "fault":
        return UNKNOWN, rate
    # What a wrong rate explains better still counts against a shift: at half the rate one fits best for a while.
    doubt = min(found.rate_evidence, max(found.evidence, 0.0))
    shift = decide(found.evidence - doubt, clock.odds * SHIFT_ODDS, found.late, found.confidence)
    return shift, UNKNOWN if shift.status == "unknown" else Verdict("fine")
