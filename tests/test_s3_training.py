"""Training with its run folder in a bucket: what is saved, lost, refused and resumed there."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fault_proxy import Fault
from tiny_training import ALONE, ROOT, launch, losses, read_metrics, run

from configs import lease, load_config, storage
from model.weights import load_weights
from model.world import complete_steps, find_checkpoint, newest_checkpoint, read_world_config
from train.checkpoint import ConsolidateConfig, consolidate
from train.config import TrainConfig
from train.exit import STOPPED
from train.run_folder import pull, push, sole_run
from train.watchdog import Watchdog

SETTINGS = ["checkpoint.every=2", "engine.name=ddp"]  # else as the run `alone` on a disk


def assert_same_end(url: str, alone: Path, folder: Path) -> None:
    """The run at `url` has the weights and figures of the other, bit for bit."""
    pull(folder, url)
    assert torch.equal(losses(folder), losses(alone))
    for name in ("model", "ema"):
        remote, local = (load_weights(newest_checkpoint(out) / f"{name}.safetensors") for out in (url, alone))
        assert all(torch.equal(remote[key], tensor) for key, tensor in local.items()), name


def test_a_run_killed_while_uploading_goes_on_from_the_checkpoint_before(
    train_args, alone, bucket_folder, proxy, tmp_path
) -> None:
    """On a machine whose disk is empty; and a checkpoint that the server refuses leaves those before it whole."""
    command = [*ALONE, *train_args, *SETTINGS, f"out={bucket_folder}"]
    held = proxy.add(Fault("held", "^PUT .*step_0000004/ema.safetensors", times=1))
    with open(tmp_path / "log", "w") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=env)
        while not held.met and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    held.released.set()
    assert held.met, (tmp_path / "log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]  # no folder of the url's name
    assert complete_steps(bucket_folder) == ["step_0000002"]
    assert "step_0000004/model.safetensors" in storage.list_tree(bucket_folder)

    refused = proxy.add(Fault("refused", "^DELETE .*step_0000006/COMPLETE", times=1))  # before anything is written
    done = run(command, WORLDLOOM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0 and refused.met == 1, done.stderr
    assert f"resumed from {bucket_folder}/step_0000002 at step 2" in done.stdout
    (error,) = [line for line in done.stderr.splitlines() if "cannot write" in line]
    assert f"cannot write {bucket_folder}/step_0000006: " in error
    assert_same_end(bucket_folder, alone, tmp_path)
    assert complete_steps(bucket_folder) == ["step_0000004", "step_0000008"]
    left = storage.list_tree(bucket_folder)
    assert not [name for name in left if name.startswith("step_") and name[:12] not in ("step_0000004", "step_0000008")]
    assert not [name for name in left if name.endswith(".claim")] and "metrics.jsonl" in left
    assert not list((tmp_path / "cache" / "tmp").glob("*/*"))

    newest = find_checkpoint(bucket_folder)
    saved = load_config(TrainConfig, [str(storage.local(f"{newest}/config.yaml"))])
    assert saved.out == bucket_folder and read_world_config(newest) == read_world_config(newest_checkpoint(alone))
    consolidate(ConsolidateConfig(bucket_folder, f"{bucket_folder}/world"))
    urls = f"{bucket_folder}/world/ema.safetensors", f"{newest}/ema.safetensors"
    whole, ema = (load_weights(storage.local(url)) for url in urls)
    assert all(torch.equal(whole[name], ema[name]) for name in ema)


@pytest.mark.long
def test_a_last_checkpoint_that_cannot_be_uploaded_is_an_error(
    train_args, alone, bucket_folder, proxy, tmp_path
) -> None:
    """Of the others it is only said."""
    command = [*ALONE, *train_args, *SETTINGS, f"out={bucket_folder}"]
    refused = proxy.add(Fault("refused", "^PUT .*step_000000[48]/trainer/rank_00000", times=2))
    done = run(command)
    assert done.returncode == 2 and refused.met == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "cannot write" in line]
    assert f"cannot write {bucket_folder}/step_0000004: " in errors[0]
    assert errors[-1].startswith(f"train run: cannot write {bucket_folder}/step_0000008: ")
    assert complete_steps(bucket_folder) == ["step_0000002", "step_0000006"]
    done = run(command)
    assert done.returncode == 0 and "step_0000006 at step 6" in done.stdout, done.stderr
    assert_same_end(bucket_folder, alone, tmp_path)


@pytest.mark.long
def test_a_rank_whose_part_is_refused_costs_one_checkpoint_and_not_the_run(train_args, bucket_folder, proxy) -> None:
    refused = proxy.add(Fault("refused", "^PUT .*step_0000004/trainer/rank_00001", times=1))
    settings = ["engine.name=deepspeed", "batch=2", "engine.timeout_s=60", f"out={bucket_folder}"]
    done = run([*launch("cpu_zero2", "-m", "train", processes=2), *train_args, *SETTINGS, *settings])
    assert done.returncode == 0 and refused.met == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if f"cannot write {bucket_folder}/step_0000004: " in line]
    assert len(errors) == 2 and any("another rank" in line for line in errors), done.stderr
    assert complete_steps(bucket_folder) == ["step_0000006", "step_0000008"]


@pytest.mark.long
def test_a_run_goes_on_from_the_bucket_on_other_processes(train_args, bucket_folder, tmp_path) -> None:
    """Machines that share nothing but the bucket: two processes, then one, then two."""
    for processes, steps in ((2, 4), (1, 6), (2, 8)):
        settings = ["engine.name=deepspeed", f"batch={4 // processes}", f"steps={steps}", f"out={bucket_folder}"]
        command = [*launch("cpu_zero2", "-m", "train", processes=processes), *train_args, *SETTINGS, *settings]
        done = run(command, WORLDLOOM_CACHE=str(tmp_path / str(steps)))
        assert done.returncode == 0, done.stderr
    pull(tmp_path, bucket_folder)
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == list(range(1, 9))


@pytest.fixture
def config(train_args, bucket_folder) -> TrainConfig:
    config = load_config(TrainConfig, [*train_args, f"out={bucket_folder}"])
    config.folder.mkdir(parents=True)
    return config


@pytest.fixture
def soon_expired(monkeypatch) -> None:
    monkeypatch.setattr(lease, "EXPIRED_S", 0.5)


def test_a_url_that_a_live_run_holds_is_refused(config, tmp_path, monkeypatch, soon_expired) -> None:
    with sole_run(config):
        with pytest.raises(ValueError, match=r"is in use by .*of process"), sole_run(config):
            pass
        monkeypatch.setenv("WORLDLOOM_CACHE", str(tmp_path))  # as on another machine
        with pytest.raises(ValueError, match=r"is in use by .*see run\.claim"), sole_run(config):
            pass
    with sole_run(config):
        pass


def test_a_url_of_a_run_that_was_killed_elsewhere_is_taken_over(config, soon_expired) -> None:
    claim = f"{config.out}/run.claim"
    storage.write_text(claim, "another machine")
    with sole_run(config):
        assert storage.exists(claim)
    assert not storage.exists(claim)


def test_a_server_without_conditional_writes_still_takes_runs(config, proxy) -> None:
    proxy.add(Fault("not offered", r"^PUT .*claim", times=1))
    with sole_run(config):
        (config.folder / "metrics.jsonl").write_text("{}\n")
    assert storage.read_bytes(f"{config.out}/metrics.jsonl") == b"{}\n"


def test_the_stacks_of_a_rank_that_ends_are_in_the_bucket_too(config) -> None:
    watchdog = Watchdog(config.folder, 3, 4, 60.0, config.out)
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        watchdog._end(["rank 1"], "a test")
    assert b"test_the_stacks_of_a_rank" in storage.read_bytes(f"{config.out}/stacks_rank_00003.txt")


def test_a_link_out_of_the_run_folder_is_not_followed_into_the_bucket(config, tmp_path) -> None:
    folder, url = config.folder, config.out
    (tmp_path / "id_rsa").write_text("secret")
    for name, target in (("key", tmp_path / "id_rsa"), ("all", tmp_path), ("lost", tmp_path / "nowhere")):
        (folder / name).symlink_to(target)
    (folder / "a.txt").write_text("text")
    (folder / "b.txt").symlink_to("a.txt")
    push(folder, url)
    assert [name for name in storage.list_tree(url) if name[0] in "kalb"] == ["a.txt", "b.txt"]


def test_what_changes_in_the_run_folder_is_copied_once(config, proxy) -> None:
    folder, url = config.folder, config.out
    for name in ("metrics.jsonl", "videos/a b.mp4", ".lock", ".a.mp4.tmp/a.mp4", STOPPED, "step_0000010/COMPLETE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    push(folder, url)
    assert storage.list_tree(url) == {"STOPPED": 7, "metrics.jsonl": 13, "videos/a b.mp4": 14}
    proxy.requests.clear()
    push(folder, url)
    assert proxy.requests == []
    (folder / "metrics.jsonl").write_text("longer than it was")
    push(folder, url)
    assert storage.list_tree(url)["metrics.jsonl"] == 18
    (folder / ".pushed.json").write_text('["metrics.jsonl", ')  # damaged: all is copied again
    storage.remove(f"{url}/videos/a b.mp4")
    push(folder, url)
    assert storage.exists(f"{url}/videos/a b.mp4")
    with sole_run(config):
        assert not storage.exists(f"{url}/{STOPPED}") and not (folder / STOPPED).exists()
