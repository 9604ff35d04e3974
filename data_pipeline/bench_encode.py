"""How fast `encode` is beside its codec alone on frames that are in memory, in one run."""

import time
from itertools import chain

import numpy as np

from configs import load_config
from data_pipeline.clips import Encoder, cut_episodes
from data_pipeline.encode import encode_recordings, load_encoder
from data_pipeline.plan import EncodeConfig, count_clips, make_plans

HELD_BYTES = 1 << 30  # of frames in memory, about


def bench_encode(words: list[str]) -> None:
    """How fast encoding is beside the codec alone, the words of `encode`: bench-encode GAME.yaml source= codec= out="""
    config = load_config(EncodeConfig, words)
    encoder = load_encoder(config)
    batches, held = hold_frames(config, encoder)
    time_codec(encoder, batches)  # warms up
    before = time_codec(encoder, batches)
    done = encode_recordings(config)
    if not done.new_clips:
        raise ValueError(f"{config.out} holds the whole set already; give a folder that is not there (out=...)")
    alone = held / ((before + time_codec(encoder, batches)) / 2)
    rate = done.new_clips / done.seconds
    waits = ", ".join(f"{what} {share:.0%}" for what, share in done.waits.items())
    print(f"codec alone   {alone:8.1f} clips/s (the frames of {held} clips, in memory, before and after)")
    print(f"encode        {rate:8.1f} clips/s, {rate / alone:.0%} of it ({done.new_clips} clips; waited for {waits})")


def hold_frames(config: EncodeConfig, encoder: Encoder) -> tuple[list[np.ndarray], int]:
    """Batches of runs (b n h w 3) uint8 of the first shards, as `encode` makes them, and how many clips they give."""
    batches, clips = [], 0
    for episodes in chain.from_iterable(plan.shards for plan in make_plans(config, encoder.codec)):
        batches += [np.stack([run.frames for run in runs]) for runs in cut_episodes(episodes, config)]
        clips += count_clips(config, episodes)
        if sum(batch.nbytes for batch in batches) > HELD_BYTES:
            break
    return batches, clips


def time_codec(encoder: Encoder, batches: list[np.ndarray]) -> float:
    """Seconds in which the codec encodes them."""
    began = time.perf_counter()
    for batch in batches:
        encoder.latents(batch)  # on the host again: nothing is left on the way
    return time.perf_counter() - began
