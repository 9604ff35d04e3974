"""What `python -m data_pipeline` does: each verb with what it prints."""

import time
from dataclasses import dataclass

from data_pipeline.encode import Encoded, drop_faulty, encode_recordings
from data_pipeline.left_out import describe_left_out
from data_pipeline.plan import EncodeConfig
from data_pipeline.record import RecordConfig, record_episodes
from data_pipeline.shards import load_manifest
from data_pipeline.verify import verify_set


def record(config: RecordConfig) -> None:
    """Play ViZDoom headless with a scripted explorer and write episodes: GAME.yaml out= episodes= seed="""
    start = time.perf_counter()
    made, frames = record_episodes(config), config.episodes * config.frames
    print(
        f"recorded {config.episodes} episodes ({made} new), {frames} frames, {frames / config.game.fps / 60:.1f} "
        f"minutes of play in {time.perf_counter() - start:.1f} s -> {config.out}"
    )


def encode(config: EncodeConfig) -> None:
    """Recordings to verified shards of latents: GAME.yaml source= codec= out=; started again it goes on."""
    _tell(encode_recordings(config))


def repair(config: EncodeConfig) -> None:
    """Re-read every shard and encode again what is missing or altered: the settings of `encode`."""
    for fault in drop_faulty(config):
        print(fault)
    _tell(encode_recordings(config))


def _tell(done: Encoded) -> None:
    rate = ""
    if done.new_clips:
        clips, megabytes = done.new_clips / done.seconds, done.bytes / 1e6 / done.seconds
        rate = f", {clips:.0f} clips/s, {megabytes:.1f} MB/s, the codec waited for {done.waits}"
    left_out = describe_left_out(done.left_out)
    print(
        f"encoded {done.clips} clips ({done.new_clips} by this worker) in {done.shards} shards in "
        f"{done.seconds:.1f} s{rate} -> {', '.join(done.manifests)}"
        f"{left_out and '; '}{left_out}"
    )


@dataclass(frozen=True)
class VerifyConfig:
    """`python -m data_pipeline verify MANIFEST`."""

    manifest: str
    sample: int | None = None  # read so many shards, others each time, instead of all of them


def verify(config: VerifyConfig) -> int:
    """Re-read the shards of a manifest and compare: verify MANIFEST sample=10; exit status 1 if anything is wrong."""
    manifest = load_manifest(config.manifest)
    faults = verify_set(config.manifest, config.sample)
    for fault in faults:
        print(fault)
    read = "" if config.sample is None else f", {min(config.sample, len(manifest.shards))} of them read"
    print(
        f"{config.manifest}: {len(manifest.shards)} shards{read}, {manifest.clips} clips, {len(faults) or 'no'} faults"
    )
    return 1 if faults else 0
