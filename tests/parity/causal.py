"""Action modules, masked clips and cached streams against recorded outputs of the reference."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from model.action_dit import ActionDiT
from model.actions import ActionModule
from model.inputs import model_inputs
from model.kv_cache import KVCache, LayerKVCache, LayerPast
from model.masks import BlockCausalMask, CausalConfig
from model.weights import load_into, load_weights
from tests.parity.fixtures import Fixture, Row, action_config, dit_config, fixture_windows, judge

KINDS = ("keyboard", "mouse")


def action_module(fixture: Fixture) -> Iterator[Row]:
    """The action module by itself: bidirectional, masked, and block after block with a cache."""
    given, tensors, grid = fixture.meta["config"], fixture.tensors, fixture.meta["grid"]
    config = action_config(given, blocks=[])
    module = ActionModule(config, given["img_hidden_size"])
    load_into(module, {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")})
    with torch.no_grad():
        if "out.full" in tensors:
            f = grid["T_full"]
            keyboard, mouse = (fixture_windows(tensors.get(f"in.{name}_full"), config, f) for name in KINDS)
            actual = module(tensors["in.x_full"], keyboard, mouse, config.rotation(f))
            yield judge(fixture, "full", actual, tensors["out.full"])
        yield from _masked_actions(fixture, module)
        yield from _streamed_actions(fixture, module)


def _masked_actions(fixture: Fixture, module: ActionModule) -> Iterator[Row]:
    tensors, config, f = fixture.tensors, module.config, fixture.meta["grid"]["T_train"]
    for name in fixture.outputs("train_local"):
        keyboard, mouse = (
            fixture_windows(tensors.get(f"in.{kind}_train", tensors.get(f"in.{kind}_stream")), config, f)
            for kind in KINDS
        )
        x = tensors["in.x_train"]
        rule = _causal(fixture.meta, int(name.removeprefix("train_local"))).action_rule()
        past = LayerPast(None, BlockCausalMask(rule, f), BlockCausalMask(rule, f, queries=x.shape[1] // f))
        yield judge(fixture, name, module(x, keyboard, mouse, config.rotation(f), past), tensors[f"out.{name}"])


def _streamed_actions(fixture: Fixture, module: ActionModule) -> Iterator[Row]:
    tensors, config, names = fixture.tensors, module.config, fixture.outputs("stream_b")
    if not names:
        return
    blocks, n = tensors["in.x_stream"], fixture.meta["num_frame_per_block"]
    rule = _causal(fixture.meta, fixture.meta["config"]["local_attn_size"], n * len(blocks)).action_rule()
    rows, s, a = blocks.shape[1], blocks.shape[2] // n, config.heads_num
    past = LayerPast(
        None,
        LayerKVCache(rule, (rows * s, 1, a, config.mouse_hidden_dim // a), blocks),
        LayerKVCache(rule, (rows, 1, a, config.keyboard_hidden_dim // a), blocks),
    )
    all_windows = [fixture_windows(tensors.get(f"in.{kind}_stream"), config, n * len(blocks)) for kind in KINDS]
    for i, x in enumerate(blocks):
        keyboard, mouse = (None if one is None else one[:, n * i : n * (i + 1)] for one in all_windows)
        actual = module(x, keyboard, mouse, config.rotation(n, start=n * i), past, update_cache=True)
        if f"stream_b{i}" in names:
            yield judge(fixture, f"stream_b{i}", actual, tensors[f"out.stream_b{i}"])


def causal_train(fixture: Fixture) -> Iterator[Row]:
    """The masked model over a whole clip, for several windows and kinds of timesteps."""
    tensors = fixture.tensors
    for name in fixture.outputs("flow_local"):
        window, times = name.removeprefix("flow_local").split("_", 1)
        dit = causal_dit(fixture, int(window))
        timestep = tensors[f"in.{times}"]
        with torch.no_grad():
            actual = dit(timestep=timestep, **fixture_inputs(fixture, dit, 0, tensors["in.x"].shape[2]))
        yield judge(fixture, name, actual, tensors[f"out.{name}"])


def causal_stream(fixture: Fixture) -> Iterator[Row]:
    """Blocks of noisy latents that read the cache, each followed by a clean pass that fills it."""
    tensors, n = fixture.tensors, fixture.meta["config"]["num_frame_per_block"]
    clean, visual = tensors["in.x_clean"], tensors.get("in.visual_context")
    dit = causal_dit(fixture, fixture.meta["config"]["local_attn_size"], clean.shape[2])
    cache = dit.make_cache(len(clean), clean.shape[3], clean.shape[4], visual)
    context = torch.full((len(clean), n), float(fixture.meta["context_timestep"]))
    with torch.no_grad():
        for i in range(clean.shape[2] // n):
            given = fixture_inputs(fixture, dit, n * i, n) | {"visual": None}
            passes = [(f"p{j}", timestep.expand(len(clean), n)) for j, timestep in enumerate(tensors["in.t_passes"])]
            for name, timestep in [*passes, ("update", context)]:
                update = name == "update"
                given["x"] = clean[:, :, n * i : n * (i + 1)] if update else tensors[f"in.x_b{i}_{name}"]
                actual = dit(timestep=timestep, **given, cache=cache, update_cache=update)
                if f"out.flow_b{i}_{name}" in tensors:
                    yield judge(fixture, f"flow_b{i}_{name}", actual, tensors[f"out.flow_b{i}_{name}"])
    yield from _cache_contents(fixture, cache)


def _cache_contents(fixture: Fixture, cache: KVCache) -> Iterator[Row]:
    """The frames that the next block will see: upstream's caches also hold those that it will drop before."""
    s = cache.grid[1] * cache.grid[2]
    layouts = {"kv": "b (f s) a e -> b f s a e", "mouse": "b f a e -> b f 1 a e", "keyboard": "b f a e -> b f 1 a e"}
    for name in [name for place in layouts for name in fixture.outputs(f"{place}_")]:
        parts = re.fullmatch(r"(kv|mouse|keyboard)_([kv])_layer(\d+)", name)
        window = parts and getattr(cache.layers[int(parts[3])], "video" if parts[1] == "kv" else parts[1])
        if not parts or window is None:
            continue
        actual = window.read()[parts[2] == "v"]
        expected = rearrange(
            fixture.tensors[f"out.{name}"], layouts[parts[1]], **({"s": s} if parts[1] == "kv" else {})
        )
        sink = window.rule.sink
        newest = expected[:, expected.shape[1] - (actual.shape[1] - sink) :]
        yield judge(fixture, name, actual, torch.cat([expected[:, :sink], newest], dim=1))


def causal_dit(fixture: Fixture, local_attn_size: int, frames: int | None = None) -> ActionDiT:
    """The fixture's causal model with its weights; the window is `frames` where `local_attn_size` is -1."""
    given = fixture.meta["config"]
    causal = _causal(given, local_attn_size, frames)
    config = replace(dit_config(given, given["action_config"]["blocks"]), causal=causal)
    dit = ActionDiT(config)
    load_into(dit, load_weights(fixture.folder / fixture.meta["weights_file"]))
    return dit


def fixture_inputs(fixture: Fixture, dit: ActionDiT, start: int, n: int) -> dict[str, Tensor | None]:
    """What latent frames `start` ... `start + n - 1` of a fixture's clip are given besides time."""
    tensors, frames, action = fixture.tensors, slice(start, start + n), dit.config.action
    assert action is not None
    rows, cond = (
        (tensors.get("in.keyboard_cond"), tensors.get("in.mouse_cond")),
        tensors["in.cond_concat"][:, :, frames],
    )
    offset = start * action.vae_time_compression_ratio
    given = model_inputs(dit, rows, "continuous", cond, tensors.get("in.visual_context"), offset)
    x = tensors.get("in.x")
    return given if x is None else given | {"x": x[:, :, frames]}


def _causal(given: Mapping[str, Any], local_attn_size: int, frames: int | None = None) -> CausalConfig:
    window = frames if local_attn_size == -1 else local_attn_size
    return CausalConfig(given["num_frame_per_block"], window, given.get("sink_size", 0))
