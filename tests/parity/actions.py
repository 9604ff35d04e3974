"""The reference's presets, overlay states, live actions and rollouts, which the model's own parity cannot know."""

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data_pipeline.types import Actions
from model.flow import FlowMatch, FlowMatchConfig
from model.wan_codec import WanCodec, WanCodecConfig, load_vae
from sampling.denoising import denoise_in_few_steps
from sampling.scripts import Scripted, read_script
from tests.parity.causal import causal_dit, fixture_inputs
from tests.parity.fixtures import Fixture, Row, judge, unsupported
from tests.parity.upstream import RELEASED, cursor_path, lit_keys, live_rows, released_space, replace_rows


def actions(fixture: Fixture) -> Iterator[Row]:
    """Preset sequences by seed, what the overlay shows of them, and actions replaced block by block."""
    rows: list[Row] = []
    for game in RELEASED:
        by_seed = [_preset_play(fixture, game, seed) for seed in fixture.meta["seeds"]]
        rows += [row for _, judged in by_seed for row in judged]
        rows += _overlay(fixture, game, [play for play, _ in by_seed if play is not None])
    if "cond_current_lengths" in fixture.meta:
        rows += _live(fixture)
    yield from rows
    inputs = {name for name in fixture.tensors if name.startswith("cond_current.replace_")}
    yield from (unsupported(fixture, name) for name in fixture.tensors.keys() - inputs - {row.output for row in rows})


def _preset_play(fixture: Fixture, game: str, seed: int) -> tuple[Actions | None, list[Row]]:
    prefix = f"{game}.seed{seed}."
    expected = fixture.tensors.get(f"{prefix}keyboard_condition")
    if expected is None:
        return None, []
    play = read_script("random", released_space(game), Scripted(len(expected), seed))
    rows = [judge(fixture, f"{prefix}keyboard_condition", torch.from_numpy(play.keyboard), expected)]
    mouse = fixture.tensors.get(f"{prefix}mouse_condition")
    if mouse is not None:
        rows.append(judge(fixture, f"{prefix}mouse_condition", torch.from_numpy(play.mouse), mouse))
    return play, rows


def _overlay(fixture: Fixture, game: str, plays: list[Actions]) -> Iterator[Row]:
    """The fixture does not say whose seed's play it drew: the nearest one counts."""
    for name in [name for name in fixture.tensors if name.startswith(f"overlay.{game}.")]:
        expected = fixture.tensors[name]
        drawn = [cursor_path(play.mouse) if "cursor" in name else lit_keys(game, play) for play in plays]
        rows = [judge(fixture, name, torch.from_numpy(one), expected) for one in drawn]
        yield min(rows, key=lambda row: row.error)


def _live(fixture: Fixture) -> Iterator[Row]:
    """Blocks of actions replaced one after the other in a play of zeros, and what is handed to the model each time."""
    tensors, lengths = fixture.tensors, fixture.meta["cond_current_lengths"]
    after = {name: tensors.get(f"cond_current.{name}_after") for name in ("keyboard", "mouse")}
    rest = {name: np.zeros((0, 0) if one is None else one.shape[1:], np.float32) for name, one in after.items()}
    play, start, handed = Actions(rest["keyboard"], rest["mouse"]), 0, []
    for i, (_, latents) in enumerate(lengths):
        held = {name: tensors.get(f"cond_current.replace_{name}_b{i}") for name in after}
        rows = live_rows(start, len(latents))
        play = replace_rows(play, rows, **{name: one.numpy() for name, one in held.items() if one is not None})
        handed.append([rows.stop, *range(start, start + len(latents))])
        start += len(latents)
    for name, actual in (("keyboard", play.keyboard), ("mouse", play.mouse)):
        expected = after[name]
        if expected is not None:
            yield judge(fixture, f"cond_current.{name}_after", torch.from_numpy(actual)[None], expected)
    expected = torch.tensor([[frames, *latents] for frames, latents in lengths])
    yield judge(fixture, "cond_current_lengths", torch.tensor(handed), expected)


@torch.no_grad()
def pipeline(fixture: Fixture) -> Iterator[Row]:
    """A whole rollout of a few-step model with the recorded noises, and its decoding block by block."""
    meta, tensors = fixture.meta, fixture.tensors
    noise, n, steps = tensors["in.noise"], meta["config"]["num_frame_per_block"], meta["denoising_step_list"]
    dit = causal_dit(fixture, meta["config"]["local_attn_size"], noise.shape[2])
    flow = FlowMatch(FlowMatchConfig(shift=meta["timestep_shift"]))
    cache = dit.make_cache(len(noise), noise.shape[3], noise.shape[4], tensors.get("in.visual_context"))
    blocks = []
    for i in range(noise.shape[2] // n):
        given = fixture_inputs(fixture, dit, n * i, n) | {"visual": None}

        def draw(level: int, i: int = i) -> Tensor:
            """The first noise, then those that follow each level."""
            fresh = tensors[f"in.renoise_b{i}_s{level - 1}"] if level else noise[:, :, n * i : n * (i + 1)]
            return fresh if fresh.ndim == 5 else rearrange(fresh, "(b f) c h w -> b c f h w", f=n)

        def velocity(x: Tensor, timestep: Tensor, given: dict[str, Tensor | None] = given) -> Tensor:
            return dit(**given | {"x": x}, timestep=timestep, cache=cache)

        latents = denoise_in_few_steps(velocity, flow, draw, steps)
        context = torch.full((len(noise),), float(meta["context_noise"]))  # a timestep; upstream adds no noise
        dit(**given | {"x": latents}, timestep=context, cache=cache, update_cache=True)
        blocks.append(latents)
    if "out.latents" in tensors:
        yield judge(fixture, "latents", torch.cat(blocks, dim=2), tensors["out.latents"])
    if "out.video_uint8" in tensors:
        yield judge(fixture, "video_uint8", _decoded(fixture, blocks), tensors["out.video_uint8"], tolerance=1)


def _decoded(fixture: Fixture, blocks: list[Tensor]) -> Tensor:
    """Levels (n h w 3) of 0 to 255, truncated as upstream does, of the first sample."""
    config = WanCodecConfig(width=fixture.meta["vae_dim"])
    codec = WanCodec(config, load_vae(config, fixture.folder / fixture.meta["vae_weights_file"])).eval()
    state, videos = None, []
    for latents in blocks:
        video, state = codec.decode_stream(latents, state)
        videos.append(rearrange(video[0].clamp(-1, 1), "c n h w -> n h w c"))
    return ((torch.cat(videos) + 1) * 127.5).floor()
