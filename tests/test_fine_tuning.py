"""Official weights in, trained on one's own recordings with their own conditioning, played, and handed back."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_released import SMALL, TOWER, TOWER_JSON, TOWER_STATE, hf_state, random_state, yamls
from tiny_shards import read_clips
from tiny_training import ALONE, ROOT, read_metrics, run

from configs import load_config
from configs.cli import run as run_command
from configs.errors import UserError
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
from train.check import check_run
from train.config import TrainConfig

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
    args = [game_yaml, f"source={recordings}", f"codec={foreign}/wan", f"out={foreign}/clips", "layout=continuous"]
    args += ["clip_frames=21", "heldout_every=3", "shard_clips=2", "vision=tokens", f"vision_weights={foreign}/clip"]
    assert run_command("data_pipeline", DATA_VERBS, ["encode", *args, "unknown=grey"]) == 0
    return foreign / "clips"


@pytest.fixture(scope="module")
def tuned(foreign: Path, clips: Path, game_yaml: str) -> Path:
    """A run that went on from the imported weights for three steps."""
    args = [str(foreign / "base_distill.safetensors"), *MODEL, game_yaml, f"codec={foreign}/wan"]
    assert run_command("model", MODEL_VERBS, ["import", *args, f"out={foreign}/imported"]) == 0
    settings = ["steps=3", "accumulation=1", "batch=2", "log_every=1", "optim.learning_rate=1e-3", "validation.clips=2"]
    settings += ["engine.name=ddp", "engine.precision=fp32", f"validation.manifest={clips}/heldout/manifest.json"]
    paths = [f"manifest={clips}/train/manifest.json", f"codec={foreign}/wan", f"init={foreign}/imported"]
    done = run([*ALONE, "configs/train/finetune.yaml", *MODEL, *settings, *paths, f"out={foreign}/tuned"])
    assert done.returncode == 0, done.stderr
    return foreign / "tuned"


def test_the_trained_model_is_handed_back_under_the_released_names(tuned: Path, foreign: Path) -> None:
    lines = read_metrics(tuned)
    assert {"loss", "loss/block_1"} <= lines[0].keys() and {"heldout/right", "heldout/none"} <= lines[-1].keys()
    args = [str(tuned), "format=official", "prefix=model.", f"out={foreign}/handed_back"]
    assert run_command("model", MODEL_VERBS, ["export", *args]) == 0
    released = load_file(foreign / "base_distill.safetensors")
    ours = load_file(foreign / "handed_back" / "diffusion_pytorch_model.safetensors")
    assert {name: ours[name].shape for name in ours} == {name: released[name].shape for name in released}
    changed = {name for name in ours if not torch.equal(ours[name], released[name])}
    scales = {name for name in ours if name.endswith(("_q_norm.weight", "_k_norm.weight"))}  # upstream never uses them
    assert changed == ours.keys() - scales


def test_the_trained_model_streams_in_few_steps_and_is_judged(
    tuned: Path, foreign: Path, clips: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, vision = next(recordings.glob("*/video.mp4")), f"vision={foreign}/clip"
    args = ["generate", str(tuned), f"prompt={video}", f"out={foreign}/play.mp4", "frames=21"]
    assert run_command("sampling", SAMPLING_VERBS, args) == 2
    assert "needs vision=" in capsys.readouterr().err.splitlines()[-1] and not (foreign / "play.mp4").exists()
    assert run_command("sampling", SAMPLING_VERBS, [*args, vision, "few_steps=[1000,666,333]"]) == 0
    assert probe(foreign / "play.mp4").frames == 21
    args = ["clips=2", "starts=1", "frames=[9]", "held_starts=1", "held_spans=1", "long_s=2", "steps=1"]
    args += [f"recordings={recordings}"]
    args += [f"manifest={clips}/heldout/manifest.json", f"out={foreign}/report", vision]
    assert run_command("sampling", SAMPLING_VERBS, ["evaluate", str(tuned), *args]) == 0


@pytest.mark.parametrize(
    ("setting", "needed"), [("model.vision=none", "tokens"), ("model.causal.unknown=zeros", "grey")]
)
def test_clips_without_what_the_model_is_shown_are_refused(foreign, clips, tmp_path, setting: str, needed: str) -> None:
    paths = [f"manifest={clips}/train/manifest.json", f"codec={foreign}/wan", f"out={tmp_path / 'run'}"]
    args = ["configs/train/finetune.yaml", *MODEL, "engine.name=ddp", *paths, setting]
    with pytest.raises(UserError, match=f"encoded with {needed}"):
        check_run(load_config(TrainConfig, args), ranks=1)


def test_clips_carry_tokens_and_grey_conditioning_as_a_rollout_has_them(
    foreign: Path, clips: Path, recordings: Path, game: GameConfig
) -> None:
    path = clips / "train" / "manifest.json"
    manifest, batch, clip = load_manifest(path), Stream(path, 2, 0, workers=0).batch_at(0), read_clips(path, 1)[0]
    assert (manifest.vision, manifest.unknown) == ("tokens", "grey")
    assert batch.visual is not None and batch.image_latents is not None
    assert batch.visual.shape == (2, 17, TOWER.hidden_size) and batch.image_latents.shape == batch.latents.shape
    # The first frame's latent is the clip's own first latent; the rest is grey.
    assert torch.allclose(batch.image_latents[:, :, 0], batch.latents[:, :, 0], rtol=0.01, atol=1e-5)  # bfloat16
    assert not torch.equal(batch.image_latents[:, :, 1], batch.latents[:, :, 1])
    codec, tower = load_codec(foreign / "wan"), load_vision(foreign / "clip")
    frames = read_game_frames(read_episode(recordings / clip.episode, game), game)
    frame = torch.from_numpy(next(islice(frames, clip.start, None)))
    image = to_video(frame[None, None])[:, :, 0]
    with torch.no_grad():
        cond, tokens = next(image_conditions(codec, image, 6)), tower(image)
    assert clip.image_latents is not None and clip.visual is not None and clip.first_frame[:2] == b"\xff\xd8"
    assert torch.equal(cond[0, 4:].bfloat16(), clip.image_latents)
    assert torch.equal(tokens[0].bfloat16(), clip.visual)
