"""The Wan codec and the vision tower against recorded outputs of the reference."""

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from configs import build
from model.vision import TowerConfig, clip_pixels, image_conditions, load_tower
from model.wan_codec import WanCodec, WanCodecConfig, load_vae
from tests.parity.fixtures import Fixture, Row, judge, known_fields


@torch.no_grad()
def vae(fixture: Fixture) -> Iterator[Row]:
    """Encoding whole and in tiles, conditioning, decoding whole, in chunks and latent by latent."""
    codec = _codec(fixture)
    video, z = fixture.tensors["in.video"], fixture.tensors["in.z"]
    latent = codec.encode(video)
    mean, std = (rearrange(one, "c -> c 1 1 1") for one in (codec.latent_mean, codec.latent_std))
    actual = {
        "mu_raw": latent * std + mean,
        "latent": latent,
        "cond_concat": next(image_conditions(codec, video[:, :, 0], latent.shape[2])),
        **_tiled(fixture, codec, video),
        **_decoded(fixture, codec, z),
    }
    for name in fixture.outputs(""):
        if name in actual:
            yield judge(fixture, name, actual[name], fixture.tensors[f"out.{name}"])


def _codec(fixture: Fixture) -> WanCodec:
    given = fixture.meta["config"]
    settings = {"width": given["dim"], "channels": given["z_dim"], **known_fields(WanCodecConfig, given)}
    config = build(WanCodecConfig, settings)
    return WanCodec(config, load_vae(config, fixture.folder / fixture.meta["weights_file"])).eval()


def _tiled(fixture: Fixture, codec: WanCodec, video: Tensor) -> dict[str, Tensor]:
    """`latent_tiled_2x3_s1x2`: tiles of 2 x 3 latents, a stride of 1 x 2; upstream's exceed its pictures."""
    encoded = {}
    for name in fixture.outputs("latent_tiled_"):
        rows, columns, down, across = map(int, re.findall(r"\d+", name))
        encoded[name] = _encode_tiles(codec, video, (rows, columns), (down, across))
    return encoded


def _encode_tiles(codec: WanCodec, video: Tensor, tile: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """As upstream: a tile counts less towards its inner edges, linearly over the overlap; corners take the less."""
    scale, (rows, columns) = codec.config.spatial, tile
    height, width = (size // scale for size in video.shape[3:])
    total, weight = torch.zeros(()), torch.zeros(())
    for top in _tile_starts(height, rows, stride[0]):
        for left in _tile_starts(width, columns, stride[1]):
            bottom, right = min(top + rows, height), min(left + columns, width)
            part = video[..., top * scale : bottom * scale, left * scale : right * scale]
            ramp_down = _edge_weights(bottom - top, rows - stride[0], top > 0, bottom < height)
            ramp_across = _edge_weights(right - left, columns - stride[1], left > 0, right < width)
            mask = torch.minimum(ramp_down[:, None], ramp_across[None])
            around = (left, width - right, top, height - bottom)
            total = total + nn.functional.pad(codec.encode(part) * mask, around)
            weight = weight + nn.functional.pad(mask, around)
    return total / weight


def _tile_starts(length: int, size: int, stride: int) -> list[int]:
    """Where tiles begin along an axis; none begins after one that reached the end."""
    return [start for start in range(0, length, stride) if start == 0 or start - stride + size < length]


def _edge_weights(length: int, border: int, rises: bool, falls: bool) -> Tensor:
    """(length): 1 inside, 1/border ... 1 over `border` places at each side that another tile overlaps."""
    weights, ramp = torch.ones(length), (torch.arange(min(border, length)) + 1) / max(border, 1)
    if rises:
        weights[: len(ramp)] = ramp
    if falls:
        weights[length - len(ramp) :] = ramp.flip(0)
    return weights


def _decoded(fixture: Fixture, codec: WanCodec, z: Tensor) -> dict[str, Tensor]:
    decoded: dict[str, Tensor] = {}
    for name in fixture.outputs("decoded_raw_"):
        decoded[name] = codec.decode_stream(z[:, :, : int(name.rpartition("_")[2])], None)[0]
    state, start = None, 0
    for name in sorted(fixture.outputs("stream_chunk"), key=lambda name: int(name.removeprefix("stream_chunk"))):
        frames = fixture.tensors[f"out.{name}"].shape[1]
        count = -(-frames // codec.config.temporal)  # the first latent of a clip gives one frame
        video, state = codec.decode_stream(z[:, :, start : start + count], state)
        decoded[name], start = rearrange(video.clamp(-1, 1), "b c n h w -> b n c h w"), start + count
    for name in fixture.outputs("stream_single_frames"):
        latents, state, parts = -(-fixture.tensors[f"out.{name}"].shape[1] // codec.config.temporal), None, []
        for latent in z[:, :, :latents].split(1, dim=2):
            video, state = codec.decode_stream(latent, state)
            parts.append(rearrange(video.clamp(-1, 1), "b c n h w -> b n c h w"))
        decoded[name] = torch.cat(parts, dim=1)
    return decoded


@torch.no_grad()
def clip(fixture: Fixture) -> Iterator[Row]:
    """The picture on its way into the tower, and its tokens with and without the last layer."""
    given, layers = fixture.meta["config"], fixture.meta["config"]["num_layers"]
    state = {key.removeprefix("sd."): value for key, value in fixture.tensors.items() if key.startswith("sd.")}
    images = rearrange(fixture.tensors["in.image"], "b c 1 h w -> b c h w")
    config = TowerConfig(
        given["image_size"],
        given["patch_size"],
        given["dim"],
        int(given["dim"] * given["mlp_ratio"]),
        given["num_heads"],
        layers - 1,
        given["norm_eps"],
    )
    actual = {
        "preprocessed": lambda: clip_pixels(images, config.image_size),
        "tokens": lambda: load_tower(state, config, fixture.case)(images),
        "tokens_all_layers": lambda: load_tower(state, replace(config, num_hidden_layers=layers), fixture.case)(images),
    }
    for name in (name for name in fixture.outputs("") if name in actual):
        yield judge(fixture, name, actual[name](), fixture.tensors[f"out.{name}"])
