"""What becomes no clip, and why: counted in the last line of `encode`, listed in a file beside the manifest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from configs import storage
from data_pipeline.readers.recording import list_names

LEFT_OUT = "left_out.json"


@dataclass(frozen=True)
class LeftOut:
    """What a set leaves out of its recordings. Frames are counted at the game's rate, but for `cut_frames`."""

    episodes: int  # all that were read
    clip_frames: int
    bad_recordings: Mapping[str, str]  # recordings that cannot be read, and episodes that cannot be decoded: why
    empty_recordings: Sequence[str]  # those of which the reader keeps nothing
    short_episodes: Mapping[str, int]  # shorter than a clip: their frames
    other_frames: int  # of the other episodes: what is in no clip
    cut_frames: int  # as recorded, that readers keep out of every episode, as far as they say so

    def save(self, url: str) -> None:
        """Writes all of it as JSON."""
        storage.write_text(url, json.dumps(asdict(self), indent=1) + "\n")


def describe_left_out(sets: Sequence[LeftOut]) -> str:
    """One line about all sets together; empty if all that was recorded is in clips."""
    bad = {name: why for one in sets for name, why in one.bad_recordings.items()}
    empty = [name for one in sets for name in one.empty_recordings]
    short = {name: frames for one in sets for name, frames in one.short_episodes.items()}
    other, cut = sum(one.other_frames for one in sets), sum(one.cut_frames for one in sets)
    parts = []
    if bad:
        why = list_names([f"{name}: {said}" for name, said in bad.items()])
        parts.append(f"{len(bad)} bad recording{'s' * (len(bad) > 1)} ({why})")
    if empty:
        parts.append(f"{len(empty)} recording{'s' * (len(empty) > 1)} of which the reader keeps nothing "
                     f"({list_names(empty)})")  # fmt: skip
    if short:
        parts.append(
            f"{len(short)} of {sum(one.episodes for one in sets)} episodes, {sum(short.values())} frames, shorter than "
            f"the {sets[0].clip_frames} of a clip ({list_names(list(short))})"
        )
    if other:
        parts.append(f"{other} frames of other episodes that no clip covers")
    if cut:
        parts.append(f"{cut} recorded frames, cut by the reader")
    return f"left out: {'; '.join(parts)}" if parts else ""
