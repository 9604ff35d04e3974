"""The model against recorded outputs of the reference: one row per output, nothing about a fixture assumed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from configs import build
from configs.errors import UserError
from model.action_dit import ActionDiT
from model.actions import ActionConfig
from model.flow import FlowMatch, FlowMatchConfig, per_sample
from model.inputs import model_inputs
from model.layers import time_sinusoid
from model.rope import rotate, time_rotation, video_rotation
from model.weights import load_into, load_weights
from tests.parity.fixtures import Fixture, Row, Verdict, dit_config, judge, known_fields, unsupported

TIMESTEP_TOLERANCE = 1e-6  # relative: timesteps are around 1000
GRADIENT_TOLERANCE = 1e-4  # of the largest expected entry: gradients are small
GRADIENT_NORM_TOLERANCE = 1e-3  # relative

# Constructor defaults of the reference's scheduler, which a fixture's `ctor` leaves out; other names than ours.
SCHEDULER_DEFAULTS = {"shift": 3.0, "sigma_min": 0.003 / 1.002, "extra_one_step": False}


def scheduler(fixture: Fixture) -> Iterator[Row]:
    """Schedules, noise, steps and conversions of every combination, and the warped few-step lists."""
    x0, noise, velocity = (fixture.tensors[f"in.{name}"] for name in ("x0", "noise", "model_output"))
    for name, combination in fixture.meta["combos"].items():
        expected = {
            key.removeprefix(f"{name}."): value for key, value in fixture.tensors.items() if key.startswith(f"{name}.")
        }
        actual = _scheduler_outputs(combination, expected, x0, noise, velocity)
        for key in expected.keys() - {"query_t", "query_t_last"} - actual.keys():
            yield unsupported(fixture, f"{name}.{key}")
        for key, value in ((key, actual[key]) for key in expected if key in actual):
            if key == "timesteps":
                yield _judge_timesteps(fixture, f"{name}.{key}", value, expected[key])
            elif key in ("step", "step_with_last"):
                yield _judge_step(fixture, f"{name}.{key}", value, expected[key], actual[f"{key} at last"])
            else:
                yield judge(fixture, f"{name}.{key}", value, expected[key])
    for name, steps in fixture.meta.get("warp_lists", {}).items():
        warped = FlowMatch(FlowMatchConfig()).warp(steps)
        yield _judge_timesteps(fixture, f"warp.{name}", warped, fixture.tensors[f"warp.{name}"])


def _judge_step(fixture: Fixture, output: str, actual: Tensor, expected: Tensor, at_last: Tensor) -> Row:
    """Upstream sends the whole batch to the end as soon as one sample is at the last level; we only that sample."""
    row = judge(fixture, output, actual, expected)
    if row.verdict == "ok" or actual.shape != expected.shape or not at_last.any():
        return row
    agrees = judge(fixture, output, actual[at_last], expected[at_last]).verdict == "ok"
    return replace(row, verdict="differs by design" if agrees else "FAIL")


def _scheduler_outputs(
    combination: dict[str, Any], queries: dict[str, Tensor], x0: Tensor, noise: Tensor, velocity: Tensor
) -> dict[str, Tensor]:
    given = {**SCHEDULER_DEFAULTS, **combination["ctor"]}
    given["train_steps"] = given.get("num_train_timesteps", 1000)
    flow = FlowMatch(build(FlowMatchConfig, known_fields(FlowMatchConfig, given)))
    asked = combination["set"]
    schedule = flow.schedule(asked["num_inference_steps"], asked.get("denoising_strength", 1.0))
    query, query_last = queries["query_t"], queries["query_t_last"]
    sigma, sigma_last = schedule.sigma(query), schedule.sigma(query_last)
    x, last = flow.add_noise(x0, noise, sigma), len(schedule.timesteps) - 1
    end = torch.full_like(sigma, schedule.end_sigma)
    # The (b f) form: samples as the frames of a video of one sample.
    frames = [rearrange(one, "f c h w -> 1 c f h w") for one in (x0, noise)]
    per_frame = flow.add_noise(frames[0], frames[1], schedule.sigma(query[None]))
    return {
        "sigmas": schedule.sigmas,
        "timesteps": schedule.timesteps,
        "add_noise": x,
        "add_noise_2d": rearrange(per_frame, "1 c f h w -> f c h w"),
        "training_target": flow.training_target(x0, noise),
        "step": flow.step(x, velocity, sigma, schedule.levels[schedule.index(query) + 1]),
        "step_to_final": flow.step(x, velocity, sigma, end),
        "step_with_last": flow.step(x, velocity, sigma_last, schedule.levels[schedule.index(query_last) + 1]),
        "step at last": schedule.index(query) == last,
        "step_with_last at last": schedule.index(query_last) == last,
        "flow_to_x0": flow.velocity_to_x0(velocity, x, sigma),
        "x0_to_flow": ((x.double() - x0.double()) / per_sample(sigma.double(), x)).to(x0.dtype),
        "training_weights": schedule.training_weight(schedule.timesteps),
        "training_weight_query": schedule.training_weight(query),
    }


def _judge_timesteps(fixture: Fixture, output: str, actual: Tensor, expected: Tensor) -> Row:
    scale = expected.abs().clamp(min=1)
    actual = actual / scale if actual.shape == expected.shape else actual
    return judge(fixture, output, actual, expected / scale, TIMESTEP_TOLERANCE)


def time_embedding(fixture: Fixture) -> Iterator[Row]:
    """The time sinusoid for several widths."""
    for name in fixture.outputs("sin_"):
        actual = time_sinusoid(fixture.tensors["in.t"], int(name.removeprefix("sin_")))
        yield judge(fixture, name, actual, fixture.tensors[f"out.{name}"])


def rope(fixture: Fixture) -> Iterator[Row]:
    """Rotations of video tokens and of action queries and keys, from several start frames."""
    split = re.search(r"split \[([\d, ]+)\], theta ([\d.]+)", fixture.meta.get("note", ""))
    action = ActionConfig(blocks=())
    channels = int(split[1].split(",")[0]) if split else action.rope_dim_list[0]
    theta = float(split[2].rstrip(".")) if split else action.rope_theta
    for name in fixture.outputs(""):
        kind, start = name.rsplit("_start", 1)
        if kind.startswith("rope_d"):
            x = fixture.tensors[f"in.x_{kind.removeprefix('rope_')}"]
            rotation = video_rotation(tuple(fixture.meta["grid"]), x.shape[-1], start=int(start))
        else:
            x = fixture.tensors[f"in.{kind}"]
            rotation = time_rotation(x.shape[1], channels, int(start), theta)
        yield judge(fixture, name, rotate(x, rotation), fixture.tensors[f"out.{name}"])


def bidirectional(fixture: Fixture) -> Iterator[Row]:
    """The whole model: velocities, and gradients of inputs and parameters."""
    config = dit_config(fixture.meta["config"])
    dit = ActionDiT(config)
    load_into(dit, load_weights(fixture.folder / fixture.meta["weights_file"]))
    with torch.no_grad():
        for name in fixture.outputs("flow_") + fixture.outputs("ext_flow_"):
            prefix, _, which = name.rpartition("flow_")
            small = which == "small_context"
            visual = fixture.tensors["in.visual_context_small" if small else "in.visual_context"]
            actual = _velocity(fixture, dit, f"in.{prefix}", 0 if small else int(which), {"visual_context": visual})
            yield judge(fixture, name, actual, fixture.tensors[f"out.{name}"])
    if fixture.outputs("grad_"):
        yield from _gradients(fixture, dit)


def _velocity(fixture: Fixture, dit: ActionDiT, prefix: str, which: int, inputs: Mapping[str, Tensor]) -> Tensor:
    def given(name: str) -> Tensor | None:
        return inputs.get(name, fixture.tensors.get(prefix + name))

    x, cond = given("x"), given("cond_concat")
    assert x is not None and cond is not None
    actions = given("keyboard_cond"), given("mouse_cond")
    timestep = fixture.tensors["in.t"][which].expand(len(x))
    return dit(x, timestep, **model_inputs(dit, actions, "continuous", cond, given("visual_context")))


def _gradients(fixture: Fixture, dit: ActionDiT) -> Iterator[Row]:
    recipe = re.search(r"loss = ([\d.]+) \* mean\(flow\(x, t\[(\d+)\]\)", fixture.meta["gradients"])
    if recipe is None:
        raise UserError(f"{fixture.case}: cannot read the loss {fixture.meta['gradients']!r}")
    names = [
        key.removeprefix("in.") for key in fixture.tensors if f"out.grad_{key.removeprefix('in.')}" in fixture.tensors
    ]
    inputs = {name: fixture.tensors[f"in.{name}"].clone().requires_grad_() for name in names}
    velocity = _velocity(fixture, dit, "in.", int(recipe[2]), inputs)
    loss = float(recipe[1]) * (velocity * fixture.tensors["in.grad_w"]).mean()
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in inputs.items()} | {"loss": loss[None]}
    for name, gradient in gradients.items():
        expected = fixture.tensors.get(f"out.grad_{name}")
        if expected is not None and gradient is not None:
            tolerance = GRADIENT_TOLERANCE * expected.abs().max().item()
            yield judge(fixture, f"grad_{name}", gradient, expected, tolerance)
    if "param_grad_norms" in fixture.meta:
        yield _judge_norms(fixture, dit)


def _judge_norms(fixture: Fixture, dit: ActionDiT) -> Row:
    """The largest relative error of the norm of a parameter's gradient; the row names it if it is too large."""
    expected = {name: norm for name, norm in fixture.meta["param_grad_norms"].items() if norm is not None}
    actual = {name: p.grad.norm().item() for name, p in dit.named_parameters() if p.grad is not None}
    errors = {name: float("inf") for name in expected.keys() ^ actual.keys()}
    errors |= {n: abs(actual[n] - expected[n]) / max(abs(expected[n]), 1e-12) for n in expected.keys() & actual.keys()}
    worst = max(errors, key=lambda name: errors[name])
    verdict: Verdict = "ok" if errors[worst] <= GRADIENT_NORM_TOLERANCE else "FAIL"
    output = "param_grad_norms" if verdict == "ok" else f"param_grad_norms ({worst})"
    return Row(fixture.case, output, errors[worst], GRADIENT_NORM_TOLERANCE, verdict)


def preprocess(fixture: Fixture) -> Iterator[Row]:
    """Images cropped, resized and scaled."""
    for name, image in fixture.meta["images"].items():
        pixels = fixture.tensors[f"in.{name}_uint8_as_float"].to(torch.uint8).numpy()
        actual = _preprocess_image(Image.fromarray(pixels), *image["target"])
        yield judge(fixture, name, actual, fixture.tensors[f"out.{name}"])


def _preprocess_image(image: Image.Image, height: int, width: int) -> Tensor:
    """Upstream's own way from an image to (3 h w) in [-1, 1]: PIL's centre crop to the aspect of `height` x `width` px,
    antialiased bilinear resize, and rounding of a crop box that falls between pixels."""
    image = image.convert("RGB")
    w, h = image.size
    if h / w > height / width:
        kept_w, kept_h = w, int(w * height / width)
    else:
        kept_w, kept_h = int(h * width / height), h
    image = image.crop(((w - kept_w) / 2, (h - kept_h) / 2, (w + kept_w) / 2, (h + kept_h) / 2))  # pyright: ignore[reportArgumentType]
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return rearrange(pixels, "h w c -> c h w") * 2 - 1
