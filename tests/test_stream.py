"""The stream: every clip once per epoch, no clip twice, and the same order however it is dealt and resumed."""

import dataclasses
import threading
from contextlib import closing
from functools import partial
from itertools import count, islice

import pytest
import torch
from tiny_shards import alter, edit, read_clips

from data_pipeline.order import Order
from data_pipeline.prefetch import run_ahead
from data_pipeline.shard_set import Shards, require_action_space
from data_pipeline.shards import load_manifest
from data_pipeline.stream import Stream

CLIPS = 8  # of the training set


@pytest.fixture
def manifest(encoded):
    return f"{encoded}/train/manifest.json"


def test_a_batch_holds_the_clips_that_were_encoded(manifest):
    clips = {f"{clip.episode}:{clip.start}": clip for clip in read_clips(manifest)}
    batch = Stream(manifest, 3, seed=0).batch_at(1)
    assert batch.latents.shape == (3, 16, 6, 4, 6) and batch.latents.dtype == torch.bfloat16
    for i, name in enumerate(batch.ids):
        assert batch.latents[i].equal(clips[name].latents)
        assert batch.keyboard[i].equal(clips[name].keyboard) and batch.mouse[i].equal(clips[name].mouse)


def test_the_order_stays_what_it_is():
    """Written down, so that no version of NumPy can change it unnoticed: a run could not be resumed."""
    order = Order([[2, 2, 2, 2]], [1.0], seed=0)
    assert order.epoch(0).clips.tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert order.epoch(1).clips.tolist() == [7, 4, 5, 1, 6, 2, 0, 3]


@pytest.mark.parametrize(
    ("shards", "world", "batch"),
    [
        (4, 2, 3),  # an epoch of 8 clips that steps of 6 do not divide
        (4, 4, 3),  # steps of 12: more than all clips
        (2, 2, 1),  # a clip per rank and shard
        (1, 1, 5),  # steps that hold two epochs and more
        (1, 5, 2),  # more ranks than shards
    ],
)
def test_every_clip_comes_once_per_epoch_in_an_order_that_ranks_and_steps_do_not_change(copied, shards, world, batch):
    url, clips = copied / "manifest.json", 2 * shards
    edit(url, lambda m: m.update(shards=m["shards"][:shards]))
    ranks = [Stream(url, batch, seed=4, place=(rank, world)) for rank in range(world)]
    steps = 3 * clips  # so that epochs end as steps do, in the end
    dealt = [[stream.batch_at(step).ids for stream in ranks] for step in range(steps)]
    assert all(len(ids) == batch for step in dealt for ids in step)  # no rank without data, ever
    order = [name for step in dealt for ids in step for name in ids]
    epochs = [order[first : first + clips] for first in range(0, len(order), clips)]
    assert len(epochs) == 3 * world * batch and all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert all(len(set(epoch)) == clips for epoch in epochs)
    assert tuple(order) == Stream(url, len(order), seed=4).batch_at(0).ids


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_it_resumes_at_any_step_with_any_number_of_workers(workers, manifest):
    whole = [Stream(manifest, 3, seed=3).batch_at(step).ids for step in range(9)]
    for start in range(9):
        with closing(Stream(manifest, 3, seed=3, workers=workers).batches(start)) as batches:
            assert [batch.ids for batch in islice(batches, 9 - start)] == whole[start:]


def test_what_goes_wrong_in_a_thread_is_raised_in_its_place():
    def make(step):
        if step == 2:
            raise SystemExit("as a library might")
        return step

    results = run_ahead((partial(make, step) for step in count()), threads=2, ahead=4, name="a")
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(SystemExit):
        next(results)


def test_a_batch_stays_as_it_is_while_others_are_read_and_closing_ends_the_threads(manifest):
    batches = Stream(manifest, 2, seed=0, workers=2).batches()
    kept = [(batch.latents[1:], batch.latents[1:].clone()) for batch in islice(batches, 4)]
    assert len(list(islice(batches, 12))) == 12
    assert any(thread.name.startswith("stream") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("stream") for thread in threading.enumerate())
    assert all(view.equal(copy) for view, copy in kept)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_sha256_stops_the_run_when_the_shard_is_used(workers, copied):
    alter(copied / "shard-000002.tar")
    stream = Stream(copied / "manifest.json", 2, seed=0, workers=workers)
    with (
        closing(stream.batches(0)) as batches,
        pytest.raises(ValueError, match=r"shard-000002.tar: altered.*python -m data_pipeline verify"),
    ):
        list(islice(batches, 4))


def test_the_bytes_of_a_shard_are_compared_unless_it_is_only_looked_at(copied):
    alter(copied / "shard-000002.tar")
    assert len([Shards(copied / "manifest.json", verify=False).read(number) for number in range(CLIPS)]) == CLIPS
    with pytest.raises(ValueError, match=r"shard-000002.tar: altered"):
        read_clips(copied / "manifest.json")


FAULTS = {
    "shard-000001.tar: truncated": lambda train: (train / "shard-000001.tar").write_bytes(b"short"),
    "shard-000002.tar: .*No such file": lambda train: (train / "shard-000002.tar").unlink(),
    "shard-000000.index.json": lambda train: (train / "shard-000000.index.json").unlink(),
    "is of another shard": lambda train: edit(train / "manifest.json", lambda m: m["shards"][0].update(clips=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_is_not_as_the_manifest_says_is_found_before_the_first_batch(fault, copied):
    FAULTS[fault](copied)
    with pytest.raises(ValueError, match=f"{fault}.*; run python -m data_pipeline verify {copied}/manifest.json"):
        Stream(copied / "manifest.json", 2, seed=0)
    (copied / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Stream(copied / "manifest.json", 1, seed=0)


def test_another_action_space_is_refused_by_name(manifest):
    own = load_manifest(manifest)
    require_action_space(own, own.game.action_space, "the game")
    require_action_space(own, dataclasses.replace(own.game.action_space, caps=()), "the game")
    other = dataclasses.replace(own.game.action_space, name="gta_drive", keys=("forward", "back"), caps=())
    with pytest.raises(ValueError, match=r"'tiny' \(forward, back, left, right;.*the checkpoint 'gta_drive'"):
        require_action_space(own, other, "the checkpoint")
