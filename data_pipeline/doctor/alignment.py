"""Whether rows of inputs and pictures go together: shift, rate, axes and their signs, in each recording and in all.

The motion of the picture is regressed on the inputs for many shifts and rates.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from data_pipeline.doctor.findings import CheckResult, Dataset, Finding
from data_pipeline.doctor.signals import RecordingSignals

MIN_FRAMES = 8  # of an episode that is measured
# Log-likelihood ratios. Of 500 clean ViZDoom recordings of 6 s the worst had 8.7 for a wrong shift, 9.0 for a wrong
# rate, 3 for a wrong axis or sign, and 9 (the next ones 2) against the motion per degree of the others; of 1,000 with
# another one's inputs, the worst had 17 and 25, and 54 % had 12 and more against that motion.
SHIFT_LLR, RATE_LLR, AXIS_LLR, UNRELATED_LLR = 12.0, 17.0, 12.0, 12.0
KNOWN_LLR = 50.0  # of all recordings together, before a single one is compared with them
BY_KEYS = 1.7  # times as much is needed where keys move the picture: they are many, and explain more
KEY_DELAY_S = 0.25  # walking begins slowly: the picture may answer a key so late; it answers the mouse at once
SHIFT_S, LEAST_SHIFT = 1.0, 8  # the largest shift that is tried, in seconds and at least in frames
# Rows of inputs per picture, for recorders that run at 24 to 60 per second.
RATES = (1.0, 0.4, 0.5, 0.6, 0.8, 5 / 6, 0.96, 25 / 24, 1.2, 1.25, 5 / 3, 2.0, 2.5)
MAX_DRIFT = 0.04  # slower drifts of one clock against another are looked for in long recordings
# The largest tenth of all differences is clipped: cuts, flow that failed, the few jerks that make a coincidence. Of 200
# ViZDoom recordings with another one's inputs, the worst then had 16 for some shift; with a fiftieth it was 22.
CLIPPED = 0.1
TINY = 1e-9
AXES = {
    "axes_swapped": ("swapped axes", "axes are swapped: pitch moves the picture sideways, yaw at most up and down"),
    "yaw_inverted": ("inverted", "yaw is inverted: above 0 it turns left"),
    "pitch_inverted": ("inverted", "pitch is inverted: above 0 it looks down"),
}


def align(data: Dataset, mouse: bool) -> tuple[dict[str, CheckResult], np.ndarray]:
    """Shift and rate, by the mouse or else by the keys, and the mouse's axes, each by what its amount counts.

    And moments (r v v) of each recording at its own shift; zeros where none is right, since the rate is wrong.
    """
    longest = max(round(SHIFT_S * data.game.fps), LEAST_SHIFT)
    shifts = np.arange(-longest, longest + 1)
    in_time = (shifts == 0) if mouse else (shifts <= 0) & (shifts >= -round(KEY_DELAY_S * data.game.fps))
    rates = [rates_for(recording.frames) for recording in data.recordings]
    each = [measure_moments(it, mouse, shifts, tried) for it, tried in zip(data.recordings, rates, strict=True)]
    together = np.sum([moments[: len(RATES)] for moments in each], axis=0)
    judged = []
    for moments, tried in zip([together, *each], [RATES, *rates], strict=True):
        llr = gain_and_llr(moments, mouse)[1] / (1.0 if mouse else BY_KEYS)
        judged.append(judge(llr, tried, shifts, in_time))
    late, shift_llr, confidence, rate, rate_llr = np.array(judged).T
    rate_check = pool(rate_llr, RATE_LLR, rate, near=0.1)
    if rate_check.status[0] > 0:  # then a shift is only what fits best for a while
        shift_llr[1:] = np.minimum(shift_llr[1:], 0)
    shift = pool(shift_llr, SHIFT_LLR, late, near=1, confidence=confidence)
    at_shift = np.stack([moments[0, longest + int(i)] for moments, i in zip(each, shift.amount[1:], strict=True)])
    wrong_rate = rate_check.status[1:] > 0
    at_shift[wrong_rate] = 0
    axes = judge_axes(at_shift, wrong_rate) if mouse else {}
    return {"frames_late": shift, "rows_per_picture": rate_check, **axes}, at_shift


def rates_for(frames: int) -> tuple[float, ...]:
    """The rates to try on a recording of `frames`: the usual ones, and drifts of 4, 6, 8, 11, ... frames along it."""
    drifts = [2 ** (i / 2) / frames for i in range(4, 61) if 2 ** (i / 2) <= MAX_DRIFT * frames]
    return (*RATES, *(1 + drift for drift in drifts), *(1 - drift for drift in drifts))


def measure_moments(recording: RecordingSignals, mouse: bool, shifts: np.ndarray, rates: Sequence[float]) -> np.ndarray:
    """(rates shifts v v): sums over all frame pairs of the products of v columns: inputs, motions, and 1.

    They are all that a regression of motion on rows of the mouse or else the keys needs. Both are differences between
    neighbours: walking goes on and drops out, a turn begins and ends at once.
    """
    total, longest = np.zeros(1), shifts[-1]
    for episode in recording.episodes:
        if len(episode) >= MIN_FRAMES:
            rows, motions = (episode.yaw_pitch, 2) if mouse else (episode.keyboard, 3)  # keys expand the picture, too
            change = clip(np.diff(episode.motion[:, :motions].astype(np.float64), axis=0))
            known, moments = np.column_stack([change, np.ones(len(change))]), []
            for rate in rates:
                padded = input_changes(rows.astype(np.float64), rate)[: len(change)]
                padded = np.pad(padded, ((longest, longest), (0, 0)))
                shifted = (padded[first : first + len(change)] for first in range(len(shifts)))
                columns = (np.column_stack([inputs, known]) for inputs in shifted)
                moments.append([values.T @ values for values in columns])
            total = total + np.array(moments)
    return total


def input_changes(rows: np.ndarray, rate: float) -> np.ndarray:
    """(n m) rows -> (n - 1, m): the input between two pictures, less that between the two before.

    `rate` rows pass from picture to picture. Zero after the last row.
    """
    numbers = np.arange(len(rows) + 1)
    summed = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
    edges = rate * numbers
    at_edges = np.stack([np.interp(edges, numbers, column) for column in summed.T], axis=1)
    changes = clip(np.diff(at_edges, n=2, axis=0))
    changes[edges[2:] > len(rows) + TINY] = 0
    return changes


def clip(values: np.ndarray) -> np.ndarray:
    """(n m) with the largest values of each column clipped; zeros do not count."""
    limits = [np.quantile(np.abs(column[column != 0]), 1 - CLIPPED) if column.any() else 0.0 for column in values.T]
    return np.clip(values, -np.array(limits), limits)


def gain_and_llr(moments: np.ndarray, mouse: bool, gain: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The best motion per unit of input (... m c) by moments (... v v), or `gain`, and the log-likelihood ratio (...)
    of the motion with it against no effect: Gaussian residuals of their measured size."""
    m = moments.shape[-1] - (3 if mouse else 4)
    inputs, mixed, pairs = moments[..., :m, :m], moments[..., :m, m:-1], moments[..., -1, -1]
    squares = np.diagonal(moments, axis1=-2, axis2=-1)[..., m:-1]
    used = np.linalg.pinv(inputs, rcond=1e-6, hermitian=True) @ mixed if gain is None else gain
    explained = 2 * (used * mixed).sum(axis=-2) - (used * (inputs @ used)).sum(axis=-2)
    left = np.maximum(squares - explained, TINY * (1 + squares))
    return used, -pairs / 2 * np.log(left / (TINY + squares)).sum(axis=-1)


def judge(
    llr: np.ndarray, rates: Sequence[float], shifts: np.ndarray, in_time: np.ndarray
) -> tuple[float, float, float, float, float]:
    """The best shift, its log-likelihood ratio and confidence, the best rate and its ratio, by `llr` (rates shifts).

    The first rate is 1; shifts `in_time` are no fault.
    """
    best, best_rate = int(np.argmax(llr[0])), int(np.argmax(llr.max(axis=1)))
    confidence = 1 / np.exp(llr[0] - llr[0, best]).sum()  # of this shift among all shifts
    shift_llr, rate_llr = llr[0][~in_time].max() - llr[0][in_time].max(), llr[best_rate].max() - llr[0, best]
    # What a wrong rate explains better still counts against a shift: at half the rate one fits best for a while.
    shift_llr -= min(rate_llr, max(shift_llr, 0.0))
    if rate_llr >= RATE_LLR:
        shift_llr = 0.0
    else:  # a shift that can be told shows that the rate is right
        rate_llr = -RATE_LLR if abs(shift_llr) >= SHIFT_LLR else 0.0
    return shifts[best], shift_llr, confidence, rates[best_rate], rate_llr


def pool(
    llr: np.ndarray,
    least: float,
    amount: float | np.ndarray = 1.0,
    near: float = 0.0,
    confidence: np.ndarray | None = None,
) -> CheckResult:
    """Verdicts from natural log-likelihood ratios (1 + r) of a fault against none, `least` or more either way.

    A recording with too little evidence, or with a fault within `near` of that of all, gets the verdict of all.
    """
    status = np.where(np.abs(llr) < least, 0, np.sign(llr)).astype(int)
    amount = np.where(status > 0, amount, 0.0)
    sure = np.where(status == 0, 0.0, 1 / (1 + np.exp(-np.abs(llr))) if confidence is None else confidence)
    pooled = (status == 0) | ((status == status[0]) & (np.abs(amount - amount[0]) <= near))
    return CheckResult(*(np.where(pooled, values[0], values) for values in (status, amount, sure)))


def judge_axes(moments: np.ndarray, silent: np.ndarray) -> dict[str, CheckResult]:
    """Whether yaw and pitch are swapped, and each inverted, by moments (r v v); unknown where `silent` (r)."""
    moments = np.concatenate([moments.sum(axis=0, keepdims=True), moments])
    mixed, squares = moments[:, :2, 2:4], np.diagonal(moments, axis1=1, axis2=2)
    share = np.minimum(mixed**2 / (squares[:, :2, None] * squares[:, None, 2:4] + TINY), 1 - TINY)
    llr = -moments[:, -1:, -1:] / 2 * np.log1p(-share)  # (1 + r, yaw and pitch, right and down)
    swapped = pool(llr[:, 0, 1] + llr[:, 1, 0] - llr[:, 0, 0] - llr[:, 1, 1], AXIS_LLR)
    signed = np.where(swapped.status[:, None, None] > 0, (llr * np.sign(mixed))[:, ::-1], llr * np.sign(mixed))
    checks = swapped, pool(signed[:, 0, 0], AXIS_LLR), pool(-signed[:, 1, 1], AXIS_LLR)
    for check in checks:
        for values in (check.status, check.amount, check.confidence):
            values[1:][silent] = 0
    return dict(zip(AXES, checks, strict=True))


def report_alignment(data: Dataset, checks: dict[str, CheckResult], stays: np.ndarray) -> Iterator[Finding]:
    """Findings of rate, shift and axes; `stays` (r) is for how many frames a picture or a row stays the same."""
    groups, fps, wrong_rate = defaultdict(list), data.game.fps, checks["rows_per_picture"].status[1:] > 0
    for rate, numbers, confidence in checks["rows_per_picture"].faults():
        groups[rate > 1, round(rate, 1)] += [(rate, i, confidence) for i in numbers]  # each has its own slow drift
    for group in groups.values():
        rates, numbers, confidences = zip(*group, strict=True)
        rate, missing = median(rates), "pictures" if rates[0] > 1 else "rows"
        what = f"{rate:.4g} rows of inputs per picture, {rate * fps:.4g} for {fps:g} a second: {missing} are missing"
        yield data.find("rate", sorted(numbers), what, max(confidences))
    for late, numbers, confidence in checks["frames_late"].faults():
        # Where each row or picture stays for some frames, its middle is some later than its beginning.
        numbers = [i for i in numbers if not wrong_rate[i] and abs(late) > stays[i] - 1]
        n, (how, sign) = abs(int(late)), ("late", "+") if late > 0 else ("early", "-")
        what = f"inputs are {n} frame{'s' * (n > 1)} {how}: row i {sign} {n} leads from frame i to i + 1"
        first_entry = data.game.inputs.first_entry + int(late)
        if numbers:
            finding = data.find("shift", numbers, what, confidence)
            by_setting = data.reader == "gf_minecraft" and 0 <= first_entry <= 2
            yield replace(finding, remedy=f"set game.inputs.first_entry={first_entry}") if by_setting else finding
    for check, (fault, what) in AXES.items():
        for _, numbers, confidence in checks[check].faults() if check in checks else ():
            yield data.find(fault, numbers, what, confidence)


def report_unrelated(
    data: Dataset, checks: dict[str, CheckResult], moments: np.ndarray, excluded: set[str]
) -> Iterator[Finding]:
    """Of recordings without a fault of their own, and not `excluded`, those that contradict the others."""
    left_out = np.array([recording.name in excluded for recording in data.recordings])
    for name, check in checks.items():
        unlike_others = (check.status != check.status[0]) | (check.amount != check.amount[0])
        left_out |= (name != "rows_per_picture") & (check.status > 0)[1:] & unlike_others[1:]
    moments = np.where(left_out[:, None, None], 0, moments)
    gain, together_llr = gain_and_llr(moments.sum(axis=0), mouse=True)
    if together_llr >= KNOWN_LLR:
        contradiction = -gain_and_llr(moments, True, gain)[1]
        for _, numbers, confidence in pool(np.array([-UNRELATED_LLR, *contradiction]), UNRELATED_LLR).faults():
            what = "inputs do not go with the picture as those of the other recordings do"
            yield data.find("unrelated", numbers, what, confidence)
