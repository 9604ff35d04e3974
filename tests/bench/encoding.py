"""How fast `encode` is beside its codec alone on frames that are in memory, in one run."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from configs import storage
from configs.errors import UserError
from data_pipeline.clips import Encoder, cut_episodes, run_starts
from data_pipeline.encode import encode_recordings, load_encoder
from data_pipeline.plan import PLAN, EncodeConfig, Plan, make_plans
from tests.bench.loader import timed

HELD_BYTES = 1 << 30  # of frames in memory, about


def bench_encode(config: EncodeConfig) -> None:
    """How fast encoding is beside the codec alone, the words of `encode`: bench-encode GAME.yaml source= codec= out="""
    encoder = load_encoder(config)
    plans = make_plans(config, encoder.codec)
    if any(storage.exists(storage.join(config.out, f"{plan.split}/{PLAN}")) for plan in plans):
        raise UserError(f"{config.out} holds shards already; give a folder that is not there (out=...)")
    batches = hold_frames(config, plans)
    encode_held(encoder, batches)  # warms up
    before = timed(encode_held, encoder, batches)
    done = encode_recordings(config)
    alone = sum(map(len, batches)) / ((before + timed(encode_held, encoder, batches)) / 2)
    runs = sum(len(run_starts(config, len(one.actions))) for plan in plans for shard in plan.shards for one in shard)
    share, clips_s = runs / done.seconds / alone, done.new_clips / done.seconds
    print(f"codec alone  {alone * config.run_frames:8.4g} frames/s (in memory, before and after)")
    print(f"encode       {share * alone * config.run_frames:8.4g} frames/s, {share:.0%} of it")
    print(f"{done.new_clips} clips, {clips_s:.3g} clips/s; the codec waited for {done.waits}")


def hold_frames(config: EncodeConfig, plans: Sequence[Plan]) -> list[np.ndarray]:
    """Batches of runs (b n h w 3) uint8 of the first episodes, as `encode` makes them."""
    batches: list[np.ndarray] = []
    for episodes in chain.from_iterable(plan.shards for plan in plans):
        for runs in cut_episodes(episodes, config):
            batches.append(np.stack([run.frames for run in runs]))
            if sum(batch.nbytes for batch in batches) > HELD_BYTES:
                return batches
    return batches


def encode_held(encoder: Encoder, batches: list[np.ndarray]) -> None:
    """The codec alone."""
    for batch in batches:
        encoder.latents(batch)  # on the host again: nothing is left on the way
