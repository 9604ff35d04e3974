"""What `python -m data_pipeline` does: each verb with what it prints."""

import time
from collections.abc import Sequence

from data_pipeline.encode import LEFT_OUT, Encoded, drop_faulty, encode
from data_pipeline.plan import EncodeConfig, LeftOut
from data_pipeline.readers.recording import list_names
from data_pipeline.record import RecordConfig, record_episodes


def record(config: RecordConfig) -> None:
    """Play ViZDoom headless with a scripted explorer and write episodes: GAME.yaml out= episodes= seed="""
    start = time.perf_counter()
    made, frames = record_episodes(config), config.episodes * config.frames
    print(
        f"recorded {config.episodes} episodes ({made} new), {frames} frames, {frames / config.game.fps / 60:.1f} "
        f"minutes of play in {time.perf_counter() - start:.1f} s -> {config.out}"
    )


def run_encode(config: EncodeConfig) -> None:
    """Recordings to verified shards of latents: GAME.yaml source= codec= out=; started again it goes on."""
    print(describe_encoded(encode(config)))


def repair(config: EncodeConfig) -> None:
    """Re-read every shard and encode again what is missing or altered: the settings of `encode`."""
    for fault in drop_faulty(config):
        print(fault)
    print(describe_encoded(encode(config)))


def describe_encoded(done: Encoded) -> str:
    """One line; its end says what was recorded and is in no clip."""
    clips_s, megabytes_s = done.new_clips / done.seconds, done.bytes / 1e6 / done.seconds
    rate = f", {clips_s:.0f} clips/s, {megabytes_s:.1f} MB/s" if done.new_clips else ""
    return (
        f"encoded {done.clips} clips ({done.new_clips} by this worker) in {done.shards} shards in "
        f"{done.seconds:.1f} s{rate} -> {', '.join(done.manifests)}{describe_left_out(done.left_out)}"
    )


def describe_left_out(sets: Sequence[LeftOut]) -> str:
    """What all sets together leave out; empty if all that was recorded is in clips."""
    bad = [f"{name}: {why}" for left_out in sets for name, why in left_out.bad_recordings.items()]
    counts = {
        f"bad recordings ({list_names(bad)})": len(bad),
        "recordings of which the reader keeps nothing": sum(len(left_out.empty_recordings) for left_out in sets),
        "episodes shorter than a clip": sum(len(left_out.short_episodes) for left_out in sets),
        "frames of other episodes that no clip covers": sum(left_out.other_frames for left_out in sets),
        "recorded frames, cut by the reader": sum(left_out.cut_frames for left_out in sets),
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return f"; left out (see {LEFT_OUT}): {'; '.join(parts)}" if parts else ""
