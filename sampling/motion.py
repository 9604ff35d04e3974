"""How the picture moves, measured without a trained judge, and whether that is what was commanded."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import cv2
import numpy as np
from einops import reduce

from configs.game import ActionSpace
from data_pipeline.motion import EXPECTED, WIDTH, FrameMotion, measure_motion, shrink
from data_pipeline.types import Actions
from sampling.scripts import TURNS, script_words

SPAN = 12  # pairs of neighbouring frames whose mean motion is judged
AXES = FrameMotion._fields[:3]  # right_px, down_px, divergence
EVALUATOR = f"OpenCV {cv2.__version__} DIS flow of pictures {WIDTH} px wide, mean over {SPAN} pairs of frames"
TURNING_DEG, STEADY_DEG = 1.0, 0.25  # degrees per frame: from which a recorded frame turns, below which it does not
KNOWN_SPANS, KNOWN_SHARE = 12, 0.9  # recorded spans of a command, and of them that agree, from which its way is known

Spans = Mapping[str, np.ndarray]  # by command, the mean motion (m 3) of spans under it


def all_motions(rollouts: np.ndarray) -> np.ndarray:
    """The motion (b n-1 3) between neighbours among the frames of `rollouts` (b n h w 3) uint8, along AXES.

    All in px per frame of these pictures, the divergence as how far their left and right edges move apart from the
    middle. OpenCV leaves the threads to us.
    """
    to_px = rollouts.shape[3] / WIDTH
    with ThreadPoolExecutor() as pool:
        motions = np.array(list(pool.map(_motion, rollouts)), np.float32).reshape(*rollouts[:, 1:, 0, 0, 0].shape, 3)
    return motions * np.array([to_px, to_px, to_px * WIDTH / 4], np.float32)  # a divergence is half sideways


def _motion(frames: np.ndarray) -> list[tuple[float, ...]]:
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    grey = [shrink(frame) for frame in frames]
    return [measure_motion(flow, before, after)[:3] for before, after in pairwise(grey)]


def span_means(motions: np.ndarray) -> np.ndarray:
    """The mean (m 3) over each whole span of `motions` (b n 3), one after the other."""
    whole = motions.shape[1] // SPAN * SPAN
    return reduce(motions[:, :whole], "b (m n) c -> (b m) c", "mean", n=SPAN)


def recorded_spans(motions: np.ndarray, recorded: Sequence[Actions], space: ActionSpace) -> dict[str, np.ndarray]:
    """The mean motion (m 3) of spans of recordings, of `motions` (b n 3), in which one command alone was held.

    Keys count while the view does not turn, turns whatever keys are held that do not move the picture along with them.
    """
    words, found = script_words(space), dict[str, list[np.ndarray]]()
    for motion, actions in zip(motions, recorded, strict=True):
        for command, word in words.items():
            for rows in _runs(_held(command, word, actions[: len(motion)], space)):
                found.setdefault(command, []).append(motion[rows].mean(axis=0))
    return {command: np.stack(means) for command, means in found.items()}


def _held(command: str, word: Actions, actions: Actions, space: ActionSpace) -> np.ndarray:
    """In which rows (n) of `actions` the command, a row `word`, is held alone."""
    deg = actions.mouse * space.mouse_unit_deg
    if command in TURNS:  # along the word's axis, and hardly along the other
        axis = int(np.abs(word.mouse[0]).argmax())
        along = deg[:, axis] * np.sign(word.mouse[0, axis])
        rivals = [EXPECTED.get(key, ("",))[0] == EXPECTED[command][0] for key in space.keys]
        alone = ~actions.keyboard[:, rivals].any(axis=1)
        return alone & (along > TURNING_DEG) & (np.abs(deg[:, 1 - axis]) < along / 2)
    return (actions.keyboard == word.keyboard).all(axis=1) & (np.abs(deg) < STEADY_DEG).all(axis=1)


def _runs(held: np.ndarray) -> Iterator[slice]:
    """Spans of half to all of SPAN rows in which `held` (n) is true."""
    for first, stop in np.flatnonzero(np.diff(held, prepend=False, append=False)).reshape(-1, 2).tolist():
        for start in range(first, stop - SPAN // 2 + 1, SPAN):
            yield slice(start, min(start + SPAN, stop))


def way_of(command: str, recorded: Spans) -> tuple[int, int] | None:
    """Along which axis and with which sign `command` moves the picture: known by its name, or else from recordings."""
    if command in EXPECTED:
        return AXES.index(EXPECTED[command][0]), EXPECTED[command][1]
    if command == "idle" or len(recorded.get(command, ())) < KNOWN_SPANS:
        return None
    positive = (recorded[command] > 0).mean(axis=0)
    axis = int(np.abs(positive - 0.5).argmax())
    sign = 1 if positive[axis] > 0.5 else -1
    return (axis, sign) if max(positive[axis], 1 - positive[axis]) >= KNOWN_SHARE else None


def held_table(made: Spans, recorded: Spans) -> dict[str, dict[str, float | str]]:
    """Per command whose way is known: of the spans `made` under it, the share that move that way and their median
    motion (> 0: that way); the same `idle`, and of the game's own spans in the recordings where there are any.

    `still` is how large the motion is with nothing pressed, over the command's.
    """
    table = {}
    for command, spans in made.items():
        if way := way_of(command, recorded):
            axis, sign = way
            along = sign * spans[:, axis], sign * made["idle"][:, axis]
            px, idle_px = float(np.median(along[0])), float(np.median(np.abs(along[1])))
            row: dict[str, float | str] = {"axis": AXES[axis], "spans": len(spans), "px": px, "idle_px": idle_px}
            row |= {"obeyed": share_along(along[0]), "idle": share_along(along[1])}
            row |= {"still": idle_px / abs(px)} if px else {}
            if command in recorded:
                real = sign * recorded[command][:, axis]
                row |= {"real": share_along(real), "real_px": float(np.median(real)), "real_spans": len(real)}
            table[command] = row
    return table


def share_along(along: np.ndarray) -> float:
    """The share of motions (m), > 0 along the command, that go its way."""
    return float((along > 0).mean())
