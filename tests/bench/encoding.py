"""How fast `encode` is beside its codec alone on frames that are in memory, in one run."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from configs import storage
from configs.errors import UserError
from data_pipeline.clips import Encoder, cut_episodes, run_starts
from data_pipeline.encode import encode, load_encoder
from data_pipeline.plan import PLAN, EncodeConfig, make_plans
from data_pipeline.types import Episode
from tests.bench.loader import timed

IN_MEMORY = 1 << 30  # bytes of frames, about


def bench_encode(config: EncodeConfig) -> None:
    """How fast encoding is beside the codec alone, the settings of `encode`: GAME.yaml source= codec= out="""
    encoder = load_encoder(config)
    plans = make_plans(config, encoder.codec)
    if any(storage.exists(storage.join(plan.folder, PLAN)) for plan in plans):
        raise UserError(f"{config.out} holds shards already; give a folder that is not there (out=...)")
    shards = [job.episodes for plan in plans for job in plan.jobs]
    batches = read_batches(config, shards)
    encode_batches(encoder, batches)  # warms up
    before = timed(encode_batches, encoder, batches)
    done = encode(config)
    alone = sum(map(len, batches)) / ((before + timed(encode_batches, encoder, batches)) / 2)
    runs = sum(len(run_starts(config, len(episode.actions))) for shard in shards for episode in shard)
    share = runs / done.seconds / alone
    print(f"codec alone  {alone * config.run_frames:8.4g} frames/s (in memory, before and after)")
    print(f"encode       {share * alone * config.run_frames:8.4g} frames/s, {share:.0%} of it")
    print(f"{done.new_clips} clips, {done.new_clips / done.seconds:.3g} clips/s")


def read_batches(config: EncodeConfig, shards: list[Sequence[Episode]]) -> list[np.ndarray]:
    """Batches of runs (b n h w 3) uint8 of the first episodes, as `encode` makes them."""
    batches: list[np.ndarray] = []
    frames = (run.frames for episodes in shards for run in cut_episodes(episodes, config))
    while sum(batch.nbytes for batch in batches) <= IN_MEMORY and (batch := list(islice(frames, config.batch))):
        batches.append(np.stack(batch))
    return batches


def encode_batches(encoder: Encoder, batches: list[np.ndarray]) -> None:
    for batch in batches:
        encoder.latents(batch)  # on the host again: nothing is left on the way
