"""`python -m data_pipeline <verb> file.yaml ... key=value ...`."""

import sys

from configs import load_config
from configs.cli import run
from data_pipeline.encode import EncodeConfig, encode_recordings
from data_pipeline.record import RecordConfig, record_episodes
from data_pipeline.shards import load_manifest, verify_set
from data_pipeline.stream import summarise


def record(words: list[str]) -> None:
    """Play ViZDoom headless with a scripted explorer and write episodes: GAME.yaml out= episodes= seed="""
    config = load_config(RecordConfig, words)
    done = record_episodes(config)
    minutes = done.frames / config.game.fps / 60
    print(
        f"recorded {done.episodes} episodes ({done.made} new), {done.frames} frames, {minutes:.1f} minutes of play "
        f"in {done.seconds:.1f} s -> {config.out}"
    )


def encode(words: list[str]) -> None:
    """Recordings to verified shards of latents: GAME.yaml source= codec= out=; started again it goes on."""
    done = encode_recordings(load_config(EncodeConfig, words))
    rate = f", {done.new_clips / done.seconds:.0f} clips/s" if done.new_clips else ""
    print(
        f"encoded {done.clips} clips ({done.new_clips} new) in {done.shards} shards in {done.seconds:.1f} s{rate} "
        f"-> {', '.join(done.manifests)}"
    )


def verify(words: list[str]) -> int:
    """Re-read every shard of a manifest and compare: verify MANIFEST; exit status 1 if anything is wrong."""
    url = _one_manifest(words)
    faults = verify_set(url)
    for fault in faults:
        print(fault)
    manifest = load_manifest(url)
    print(f"{url}: {len(manifest.shards)} shards, {manifest.clips} clips, {len(faults) or 'no'} faults")
    return 1 if faults else 0


def inspect(words: list[str]) -> None:
    """Say in a few lines what a manifest holds: inspect MANIFEST."""
    for line in summarise(_one_manifest(words)):
        print(line)


def _one_manifest(words: list[str]) -> str:
    if len(words) != 1:
        raise ValueError("give the path of one manifest.json and nothing else")
    return words[0]


VERBS = {"record": record, "encode": encode, "verify": verify, "inspect": inspect}

if __name__ == "__main__":
    sys.exit(run("data_pipeline", VERBS))
