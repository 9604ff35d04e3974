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
    bad = [f"{name}: {why}" for one in sets for name, why in one.bad_recordings.items()]
    short = f"episodes shorter than the {sets[0].clip_frames} frames of a clip"
    counts = {
        f"bad recordings ({list_names(bad)})": len(bad),
        "recordings of which the reader keeps nothing": sum(len(one.empty_recordings) for one in sets),
        short: sum(len(one.short_episodes) for one in sets),
        "frames of other episodes that no clip covers": sum(one.other_frames for one in sets),
        "recorded frames, cut by the reader": sum(one.cut_frames for one in sets),
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return f"left out (see {LEFT_OUT}): {'; '.join(parts)}" if parts else ""
