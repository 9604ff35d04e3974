"""The demo's codec, never below its linear part, and a codec that is one file away from use."""

from pathlib import Path

import pytest
import torch
from tiny_shards import read_clips
from tiny_world import fitted_codec, random_video
from toy_codec import ToyCodec

from configs import load_config
from configs.errors import UserError
from data_pipeline.encode import encode
from data_pipeline.plan import EncodeConfig
from data_pipeline.readers import find_recordings
from data_pipeline.shards import load_manifest
from model.codec import CODECS, codec_hash, copy_codec, load_codec
from model.patch_codec import PatchCodec, PatchCodecConfig
from train.codec import CodecTrainConfig, cut_clips, fit_decoder, mean_psnr, train_codec

TINY = fitted_codec().config


@pytest.fixture
def codec() -> PatchCodec:
    """A fitted encoder, and a decoder whose every weight matters."""
    codec = fitted_codec()
    torch.nn.init.normal_(codec.leave.weight, std=0.1)
    return codec.requires_grad_(False)


def test_nine_frames_become_three_latents_an_eighth_in_size(codec) -> None:
    assert codec.encode(random_video(9)).shape == (1, 16, 3, 4, 6)
    assert codec.decode(torch.zeros(2, 16, 3, 4, 6)).shape == (2, 3, 9, 32, 48)


def test_normalised_latents_have_a_mean_square_of_one(codec) -> None:
    fitted_on = random_video(256)
    latents = codec.encode(torch.cat([fitted_on[:, :, :1], fitted_on], dim=2))[:, :, 1:]
    assert latents.square().mean().item() == pytest.approx(1.0, abs=1e-3)


def test_a_folder_without_a_codec_and_an_unknown_codec_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m train codec"):
        load_codec(tmp_path)
    (tmp_path / "config.yaml").write_text("name: other")
    with pytest.raises(UserError, match=r"name=other.*patch, wan"):
        load_codec(tmp_path)


def test_a_codec_is_a_file_and_a_line(tmp_path: Path, monkeypatch, game, recordings) -> None:
    monkeypatch.setitem(CODECS, "toy", ToyCodec)
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "toy.txt").write_text("its weights")
    (tmp_path / "codec" / "config.yaml").write_text("name: toy")
    kind = {"layout": "continuous", "clip_frames": 7, "heldout_every": 0}
    encode(EncodeConfig(game, str(recordings), str(tmp_path / "codec"), str(tmp_path / "latents"), **kind))
    manifest = load_manifest(url := str(tmp_path / "latents" / "train" / "manifest.json"))
    assert (manifest.codec, manifest.latent_channels, manifest.spatial, manifest.temporal) == ("toy", 3, 16, 2)
    latents = read_clips(url, 1)[0].latents
    assert latents.shape == (3, 4, game.height // 16, game.width // 16)
    copy_codec(tmp_path / "codec", tmp_path / "copy")
    assert codec_hash(tmp_path / "copy") == manifest.codec_hash
    codec, video = load_codec(tmp_path / "copy"), random_video(5)
    assert codec.decode(codec.encode(video)).shape == video.shape


def test_the_fit_starts_at_the_pca_and_does_not_fall_below(game, recordings) -> None:
    config = CodecTrainConfig(game, str(recordings), "unused", TINY, steps=30, batch=2, warmup_steps=5)
    clips = cut_clips(config, find_recordings("worldloom", recordings)[:2])
    codec = fitted_codec()
    latents = codec.encode(random_video(9))
    linear = codec.linear_decode(latents)[:, :, 4:].clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents)[:, :, 1:], linear, atol=1e-6, rtol=0)
    before = mean_psnr(codec, clips)
    fit_decoder(codec, clips, config, torch.Generator().manual_seed(0))
    assert mean_psnr(codec, clips) > before + 0.05


def test_the_command_writes_a_codec_that_loads(game, recordings, tmp_path, capsys) -> None:
    train_codec(CodecTrainConfig(game, str(recordings), str(tmp_path), TINY, steps=2, batch=1, heldout_every=3))
    codec = load_codec(tmp_path)
    assert codec.config == load_config(PatchCodecConfig, [str(tmp_path / "config.yaml")])
    assert "dB on held-out episodes" in capsys.readouterr().out
    assert len(codec_hash(tmp_path)) == 12


@pytest.mark.parametrize(
    "arg", ["steps=0", "warmup_steps=0", "batch=0", "episodes=-1", "heldout_every=1", "learning_rate=-1", "seed=-1"]
)
def test_a_codec_that_cannot_be_fitted_is_refused_by_the_settings_name(game_yaml, tmp_path, arg: str) -> None:
    with pytest.raises(ValueError, match=f"^{arg}(\\.0)? must lie between"):
        load_config(CodecTrainConfig, [game_yaml, f"source={tmp_path}", f"out={tmp_path}", arg])
