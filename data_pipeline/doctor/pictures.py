"""What a recording's files say of its pictures, and what becomes of them, in words."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from configs.game import GameConfig
from data_pipeline.doctor.findings import Finding
from data_pipeline.doctor.signals import RecordingSignals
from data_pipeline.readers import KEPT_WELL, kept_share

KEPT_LEAST = 0.5  # of the picture: what is cropped further is another view


def report_pictures(recordings: Sequence[RecordingSignals], game: GameConfig) -> Iterator[Finding]:
    """A finding for each way to show stored pictures otherwise, and for each size that is cropped."""
    by_changes = sorted((one for one in recordings if one.changes), key=lambda one: one.changes)
    for changes, those in groupby(by_changes, key=lambda one: one.changes):
        what = f"stored pictures are {changes}, as players show them"
        names = tuple(one.name for one in those)
        yield Finding("shown otherwise", names, what, "look at one: a recorder may have said it wrongly", harmful=False)
    by_size = sorted(recordings, key=lambda one: one.size)
    for size, those in groupby(by_size, key=lambda one: one.size):
        share = kept_share(size, game.height, game.width)
        if share < KEPT_WELL:
            names = tuple(one.name for one in those)
            what = f"{share:.0%} of the picture is kept: {size[0]}x{size[1]} px become {game.height}x{game.width}"
            remedy = "record in the game's proportions, or set game.height and game.width to the recordings'"
            yield Finding("cropped", names, what, remedy, harmful=share < KEPT_LEAST)


def report_lengths(recordings: Sequence[RecordingSignals], clip_frames: int) -> Iterator[Finding]:
    """A finding for episodes that are shorter than a clip."""
    short = {one.name: [len(e) for e in one.episodes if len(e) < clip_frames] for one in recordings}
    names = tuple(name for name, lengths in short.items() if lengths)
    if names:
        lost = [frames for lengths in short.values() for frames in lengths]
        total = sum(len(one.episodes) for one in recordings)
        what = f"{len(lost)} of {total} episodes ({sum(lost)} frames) are shorter than a clip of {clip_frames} frames"
        yield Finding("short", names, what, "encode leaves them out: record longer ones or lower clip_frames", False)
