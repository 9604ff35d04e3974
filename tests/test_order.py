"""The order of mixed and grouped sets, and what the stream does with shards that cannot be read."""

import dataclasses
import json
from collections import Counter
from contextlib import ExitStack, closing
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import yaml
from tiny_shards import alter

from configs import build
from configs.cli import run
from data_pipeline.encode import encode
from data_pipeline.order import Order
from data_pipeline.shards import load_manifest
from data_pipeline.stream import LoaderConfig, Stream
from data_pipeline.types import Source
from train.__main__ import VERBS


def order(shards, weights=None, seed=0, shuffle_shards=0):
    return Order(shards, weights or [1.0] * len(shards), seed, shuffle_shards)


@pytest.mark.parametrize("shuffle_shards", [0, 1, 2, 3, 100])
def test_every_clip_comes_once_per_epoch_in_groups_too(shuffle_shards):
    mixed = order([[3, 1, 4], [1, 5]], seed=7, shuffle_shards=shuffle_shards)
    epochs = [mixed.epoch(e).clips.tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_group_needs_no_more_shards_than_asked_for_and_uses_them_up():
    shards = [5] * 10
    mixed = order([shards], shuffle_shards=3)
    epoch = mixed.epoch(2)
    shard_of = np.repeat(np.arange(10), 5)
    used = [shard_of[epoch.clips[epoch.groups == group]] for group in range(4)]
    assert [len(set(group.tolist())) for group in used] == [3, 3, 3, 1]
    assert (np.diff(epoch.groups) >= 0).all() and sorted({s for g in used for s in g.tolist()}) == list(range(10))
    after_the_first, after_the_last = (mixed.shards_after(2, group, 1, 0, 1) for group in (0, 3))
    assert after_the_first == list(dict.fromkeys(used[1].tolist()))
    assert after_the_last == list(dict.fromkeys(shard_of[mixed.epoch(3).clips[mixed.epoch(3).groups == 0]].tolist()))
    assert any((np.diff(group) != 0).sum() > 3 for group in used), "clips of a group's shards come mixed"


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (1, 4), (3, 2), (2, 7), (25, 3)])
@pytest.mark.parametrize(("sets", "weights"), [([[5] * 10], [1.0]), ([[4, 1, 7, 2, 2], [9, 3]], [1.3, 0.1])])
def test_a_rank_fetches_the_shards_of_the_next_group_that_its_samples_lie_in(batch, world, sets, weights):
    mixed = order(sets, weights, shuffle_shards=2)
    shard_of = np.repeat(np.arange(sum(map(len, sets))), [clips for shards in sets for clips in shards])
    samples = range(4 * mixed.clips_per_epoch)
    groups = list(dict.fromkeys(map(mixed.group, samples)))
    for rank in range(world):
        steps = range(len(samples) // (batch * world) + 1)
        mine = [(step * world + rank) * batch + i for step in steps for i in range(batch)]
        read = [(mixed.group(sample), int(shard_of[mixed.clip(sample)])) for sample in mine]
        for group, following in pairwise(groups[:-1]):  # the last one is not read to its end
            needed = list(dict.fromkeys(shard for where, shard in read if where == following))
            assert mixed.shards_after(*group, batch, rank, world) == needed, (rank, following)


def test_a_weight_is_how_often_a_clip_comes_per_epoch():
    mixed = order([[10], [20], [8]], weights=[1.0, 2.0, 0.25], seed=3)
    assert mixed.clips_per_epoch == len(mixed.epoch(0).clips) == 10 + 40 + 2
    for epoch in range(3):
        times = Counter(mixed.epoch(epoch).clips.tolist())
        assert all(times[clip] == 1 for clip in range(10)) and all(times[clip] == 2 for clip in range(10, 30))
    seldom = [clip for epoch in range(4) for clip in mixed.epoch(epoch).clips.tolist() if clip >= 30]
    assert sorted(seldom) == list(range(30, 38)), "each once in four epochs"


def test_odd_weights_use_all_clips_equally_often_in_the_long_run():
    mixed = order([[7]], weights=[1.3], seed=1)
    times = Counter(clip for epoch in range(70) for clip in mixed.epoch(epoch).clips.tolist())
    assert set(times.values()) == {70 * 9 // 7}


def test_groups_and_weights_give_an_order_that_is_a_function_of_seed_and_epoch():
    first, same, other = (order([[6, 6], [9]], [1.0, 0.5], seed, 2) for seed in (4, 4, 5))
    assert [first.epoch(e).clips.tolist() for e in (5, 0)] == [same.epoch(e).clips.tolist() for e in (5, 0)]
    second = first.epoch(1).clips.tolist()
    assert second != other.epoch(1).clips.tolist()
    assert [first.clip(sample) for sample in range(first.clips_per_epoch, 2 * first.clips_per_epoch)] == second


@pytest.fixture(scope="module")
def two_sets(encoded):
    """Training and held-out clips as two sets that are mixed, the second with each clip twice per epoch."""
    return [Source(f"{encoded}/train/manifest.json"), Source(f"{encoded}/heldout/manifest.json", weight=2.0)]


def names(sources, world=1, workers=0, start=0, stop=12, **loader):
    """The run's samples from micro-step `start` of 4 / `world` clips on, put together over all ranks."""
    with ExitStack() as stack:
        streams = [Stream(sources, 4 // world, 5, (r, world), workers, LoaderConfig(**loader)) for r in range(world)]
        ranks = [stack.enter_context(closing(stream.batches(start))) for stream in streams]
        return [name for _ in range(start, stop) for batches in ranks for name in next(batches).ids]


@pytest.mark.parametrize("shuffle_shards", [0, 2])
def test_mixed_sets_resume_at_any_step_with_other_ranks_and_workers(two_sets, shuffle_shards):
    whole = names(two_sets, shuffle_shards=shuffle_shards)
    times = Counter(whole[:16])
    manifest = load_manifest(two_sets[1].path)
    heldout = {episode for info in manifest.shards for episode in info.episodes}
    assert all(count == (2 if name.partition(":")[0] in heldout else 1) for name, count in times.items())
    for world, workers in [(1, 1), (1, 2), (2, 0), (2, 2), (4, 0), (4, 1)]:
        for start in (0, 3, 8):
            mixed = names(two_sets, world, workers, start, shuffle_shards=shuffle_shards)
            assert mixed == whole[4 * start :], (world, workers, start)


def test_sets_of_another_kind_are_not_mixed(two_sets, encode_config, tmp_path):
    other = dataclasses.replace(encode_config, out=str(tmp_path), layout="continuous", clip_frames=21)
    encode(other)
    with pytest.raises(ValueError, match=r"has layout continuous, .* chunked; they must agree"):
        Stream([*two_sets, Source(f"{tmp_path}/train/manifest.json")], 1, seed=0)
    with pytest.raises(ValueError, match="weight=0"):
        build(Source, {"path": "manifest.json", "weight": 0})
    with pytest.raises(ValueError, match=r"weight=0.01 of .*heldout"):
        Stream([two_sets[0], dataclasses.replace(two_sets[1], weight=0.01)], 1, seed=0)


@pytest.fixture
def damaged(copied):
    """The manifest of a copy of the training set with one damaged shard of its four: two clips of eight."""
    alter(copied / "shard-000002.tar")
    return copied / "manifest.json"


def names_of_four(manifest, workers, start=0):
    """What four batches of two skip, and the episodes in them."""
    stream = Stream(manifest, 2, seed=0, workers=workers, loader=LoaderConfig(on_corrupt="skip"))
    with closing(stream.batches(start)) as stream_batches:
        batches = list(islice(stream_batches, 4))
    assert all(len(batch.ids) == 2 and torch.isfinite(batch.latents.float()).all() for batch in batches)
    return sum(batch.skipped for batch in batches), {name.partition(":")[0] for batch in batches for name in batch.ids}


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (0, 1), (2, 1)])
def test_clips_of_a_corrupt_shard_and_of_one_that_is_gone_are_skipped_and_counted_if_asked(damaged, start, workers):
    bad = load_manifest(damaged).shards[2:3]
    if start:
        (damaged.parent / "shard-000002.tar").unlink()
        (damaged.parent / "shard-000001.index.json").unlink()
        bad = load_manifest(damaged).shards[1:3]
        with pytest.raises(ValueError, match=r"shard-00000[12].tar"):
            Stream(damaged, 2, seed=0)
    skipped, episodes = names_of_four(damaged, workers, start)
    assert skipped >= 2 * len(bad) and not episodes & {episode for info in bad for episode in info.episodes}


def test_a_set_of_which_nothing_can_be_read_stops_even_then(damaged):
    for shard in damaged.parent.glob("*.tar"):
        shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"no clip of .* can be read, .* shard .* altered"):
        Stream(damaged, 2, seed=0, loader=LoaderConfig(on_corrupt="skip")).batch_at(0)


def test_a_shard_that_is_gone_in_the_middle_stops_with_its_name(copied):
    batches = Stream(copied / "manifest.json", 2, seed=0, workers=0).batches()
    next(batches)
    for shard in copied.glob("*.tar"):
        shard.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"shard-00000\d.tar"):
        list(islice(batches, 8))


def test_training_takes_several_sets_with_weights_and_refuses_another_mixture_on_resume(
    train_args, encoded, tmp_path, capsys
):
    weights = {"train": 1, "heldout": 2}
    sets = [{"path": f"{encoded}/{split}/manifest.json", "weight": weight} for split, weight in weights.items()]
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(yaml.safe_dump({"manifest": None, "manifests": sets}))
    args = [*train_args, str(mixed), f"out={tmp_path / 'run'}", "steps=2", "batch=2", "engine.name=ddp"]
    assert run("train", VERBS, args, default="run") == 0
    sets[1]["weight"] = 3
    mixed.write_text(yaml.safe_dump({"manifest": None, "manifests": sets}))
    assert run("train", VERBS, [*args, "steps=3"], default="run") == 2
    assert "use the same, or start anew with" in capsys.readouterr().err
    mixed.write_text(yaml.safe_dump({"manifests": sets}))
    assert run("train", VERBS, args, default="run") == 2
    assert "manifests=" in capsys.readouterr().err


def test_training_counts_the_clips_that_it_skips(train_args, damaged, tmp_path):
    args = [*train_args, f"manifest={damaged}", f"out={tmp_path / 'run'}", "steps=4", "batch=2", "engine.name=ddp"]
    assert run("train", VERBS, [*args, "loader.on_corrupt=skip"], default="run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped_clips", 0) for line in lines) >= 2
    assert run("train", VERBS, [*args[:-4], f"out={tmp_path / 'stops'}", *args[-3:]], default="run") == 2
