"""Official weights in, trained on one's own recordings with their own conditioning, played, and handed back."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_released import SMALL, TOWER, TOWER_JSON, TOWER_STATE, hf_state, random_state, yamls
from tiny_shards import read_clips

from configs import load_config
from configs.cli import run as run_words
from configs.game import GameConfig
from data_pipeline.__main__ import VERBS as DATA_VERBS
from data_pipeline.readers import read_game_frames
from data_pipeline.readers.worldloom import read_episode
from data_pipeline.shards import load_manifest
from data_pipeline.stream import Stream
from data_pipeline.video import probe, to_video
from model.__main__ import VERBS as MODEL_VERBS
from model.codec import load_codec
from model.config import ModelConfig
from model.vision import image_conditions, load_tower, load_vision
from model.weights import load_weights
from sampling.__main__ import VERBS as SAMPLING_VERBS

ROOT = Path(__file__).parent.parent
MODEL = [yamls("universal")[0], *SMALL, f"model.img_dim={TOWER.hidden_size}"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a team has on disk: a student's file, Wan's autoencoder and a vision tower, all small."""
    folder = tmp_path_factory.mktemp("foreign")
    state = random_state(load_config(ModelConfig, MODEL).model, "model.")
    save_file({name: 0.05 * tensor for name, tensor in state.items()}, folder / "base_distill.safetensors")
    (folder / "wan").mkdir()
    torch.save(load_weights(ROOT / "tests" / "golden" / "vae.weights.safetensors"), folder / "wan" / "Wan2.1_VAE.pth")
    (folder / "wan" / "config.yaml").write_text(yaml.safe_dump({"name": "wan", "width": 4}))
    (folder / "clip").mkdir()
    save_file(hf_state(load_tower(TOWER_STATE, TOWER, "the fixture")), folder / "clip" / "model.safetensors")
    (folder / "clip" / "config.json").write_text(json.dumps(TOWER_JSON))
    return folder


@pytest.fixture(scope="module")
def clips(foreign: Path, recordings: Path, game_yaml: str) -> Path:
    """The recordings as clips that carry the released models' conditioning."""
    words = [game_yaml, f"source={recordings}", f"codec={foreign}/wan", f"out={foreign}/clips", "layout=continuous"]
    words += ["clip_frames=21", "heldout_every=3", "shard_clips=2", "vision=tokens", f"vision_weights={foreign}/clip"]
    assert run_words("data_pipeline", DATA_VERBS, ["encode", *words, "unknown=grey"]) == 0
    return foreign / "clips"


def test_clips_carry_tokens_and_grey_conditioning_of_their_first_frame(foreign: Path, clips: Path) -> None:
    manifest = load_manifest(clips / "train" / "manifest.json")
    assert (manifest.vision, manifest.unknown) == ("tokens", "grey")
    batch = Stream(clips / "train" / "manifest.json", 2, 0, workers=0).batch_at(0)
    assert batch.visual is not None and batch.image_latents is not None
    assert batch.visual.shape == (2, 17, TOWER.hidden_size) and batch.image_latents.shape == batch.latents.shape
    # The first frame's latent is the clip's own first latent; the rest is grey.
    assert torch.allclose(batch.image_latents[:, :, 0], batch.latents[:, :, 0], rtol=0.01, atol=1e-5)  # bfloat16
    assert not torch.equal(batch.image_latents[:, :, 1], batch.latents[:, :, 1])
    clip = read_clips(clips / "train" / "manifest.json", 1)[0]
    assert clip.visual is not None and clip.image_latents is not None and clip.first_frame[:2] == b"\xff\xd8"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def tuned(foreign: Path, clips: Path, game_yaml: str) -> Path:
    """A run that went on from the imported weights for three steps."""
    imported = [str(foreign / "base_distill.safetensors"), *MODEL, game_yaml]
    words = [*imported, f"codec={foreign}/wan", f"out={foreign}/imported"]
    assert run_words("model", MODEL_VERBS, ["import", *words]) == 0
    given = ["configs/train/finetune.yaml", *MODEL, "steps=3", "accumulation=1", "batch=2"]
    given += ["engine.name=ddp", "engine.precision=fp32", "optim.learning_rate=1e-3", "log_every=1"]
    places = [f"manifest={clips}/train/manifest.json", f"codec={foreign}/wan", f"init={foreign}/imported"]
    done = command("train", *given, *places, f"out={foreign}/tuned")
    assert done.returncode == 0, done.stderr
    return foreign / "tuned"


def test_the_trained_model_is_handed_back_under_the_released_names(tuned: Path, foreign: Path) -> None:
    words = [str(tuned), "format=official", "prefix=model.", f"out={foreign}/handed_back"]
    assert run_words("model", MODEL_VERBS, ["export", *words]) == 0
    released = load_file(foreign / "base_distill.safetensors")
    ours = load_file(foreign / "handed_back" / "diffusion_pytorch_model.safetensors")
    assert {name: one.shape for name, one in ours.items()} == {name: one.shape for name, one in released.items()}
    changed = {name for name in ours if not torch.equal(ours[name], released[name])}
    scales = {name for name in ours if name.endswith(("_q_norm.weight", "_k_norm.weight"))}  # upstream never uses them
    assert changed == ours.keys() - scales


def test_the_trained_model_streams_in_few_steps_and_is_judged(
    tuned: Path, foreign: Path, clips: Path, recordings: Path
) -> None:
    video = next(recordings.glob("*/video.mp4"))
    play = [str(tuned), f"prompt={video}", f"vision={foreign}/clip", f"out={foreign}/play.mp4"]
    words = ["generate", *play, "frames=21", "few_steps=[1000,666,333]"]
    assert run_words("sampling", SAMPLING_VERBS, words) == 0
    assert probe(foreign / "play.mp4").frames == 21
    small = ["clips=2", "starts=1", "chunks=1", "held_starts=1", "held_chunks=1", "steps=1"]
    places = [f"recordings={recordings}", f"manifest={clips}/heldout/manifest.json", f"out={foreign}/report"]
    assert (
        run_words("sampling", SAMPLING_VERBS, ["evaluate", str(tuned), *places, *small, f"vision={foreign}/clip"]) == 0
    )


def test_clips_without_what_the_model_is_told_are_refused_in_one_line(
    foreign: Path, clips: Path, tmp_path: Path
) -> None:
    places = [f"manifest={clips}/train/manifest.json", f"codec={foreign}/wan", f"out={tmp_path / 'run'}"]
    words = ["configs/train/finetune.yaml", *MODEL, "engine.name=ddp", *places]
    for word, needed in (("model.vision=none", "tokens"), ("model.causal.unknown=zeros", "grey")):
        done = command("train", *words, word)
        assert done.returncode == 2 and f"encoded with {needed}" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_with_vision_says_what_it_needs(
    tuned: Path, foreign: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = next(recordings.glob("*/video.mp4"))
    words = ["generate", str(tuned), f"prompt={video}", f"out={foreign}/no.mp4", "frames=21"]
    assert run_words("sampling", SAMPLING_VERBS, words) == 2
    assert "needs vision=" in capsys.readouterr().err.splitlines()[-1] and not (foreign / "no.mp4").exists()


def test_the_stored_conditioning_is_the_one_that_a_rollout_has(
    foreign: Path, clips: Path, recordings: Path, game: GameConfig
) -> None:
    clip = read_clips(clips / "train" / "manifest.json", 1)[0]
    codec, tower = load_codec(foreign / "wan"), load_vision(foreign / "clip")
    frames = read_game_frames(read_episode(recordings / clip.episode, game), game)
    frame = torch.from_numpy(next(islice(frames, clip.start, None)))
    image = to_video(frame[None, None])[:, :, 0]
    with torch.no_grad():
        cond, tokens = next(image_conditions(codec, image, 6)), tower(image)
    assert clip.image_latents is not None and clip.visual is not None
    assert torch.equal(cond[0, 4:].bfloat16(), clip.image_latents)
    assert torch.equal(tokens[0].bfloat16(), clip.visual)
