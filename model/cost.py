"""FLOPs of a pass, counted on the meta device: nothing is computed and no memory is used."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.action_dit import ActionDiT
from model.config import ActionDiTConfig

Run = Callable[[], object]

META = torch.device("meta")
IMAGE_TOKENS = {"tokens": 257, "pooled": 1}  # by ActionDiTConfig.vision


def count_flops(run: Run) -> int:
    """FLOPs of one run on the meta device: a multiply-add is two, and attention counts without its mask."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def training_flops(model: ActionDiTConfig, b: int, f: int, h: int, w: int) -> int:
    """FLOPs of one forward and backward pass over `b` clips of `f` latents of `h` x `w` rows and columns.

    What checkpointing computes again is not counted: these are the FLOPs that the model needs.
    """
    dit, inputs = counted_dit(model), random_inputs(model, b, f, h, w, META)
    return count_flops(lambda: run_clip(dit, inputs, train=True))


def counted_dit(model: ActionDiTConfig) -> ActionDiT:
    """The model on the meta device, with an attention that FlopCounterMode knows and nothing computed twice."""
    with META:
        return ActionDiT(replace(model, attention="sdpa", checkpoint_every=0)).eval()


def run_clip(dit: ActionDiT, inputs: dict[str, Tensor], train: bool) -> None:
    """One pass over a clip of `inputs`; with its backward pass if `train`."""
    with torch.set_grad_enabled(train):
        velocity = dit(**inputs)
        if train:
            velocity.square().mean().backward()
            dit.zero_grad(set_to_none=True)


def random_inputs(model: ActionDiTConfig, b: int, f: int, h: int, w: int, device: torch.device) -> dict[str, Tensor]:
    """Random inputs of a pass over `b` clips of `f` latents of `h` x `w`; a causal model has a time per frame."""
    with device:
        inputs = {
            "x": torch.randn(b, model.out_dim, f, h, w),
            "timestep": 1000 * (torch.rand(b, f) if model.causal else torch.rand(b)),
            "cond": torch.randn(b, model.in_dim - model.out_dim, f, h, w),
        }
        action = model.action
        if action and action.enable_keyboard:
            inputs["keyboard"] = torch.randn(b, f, action.window, action.keys)
        if action and action.enable_mouse:
            inputs["mouse"] = torch.randn(b, f, action.window, action.mouse_dim_in)
        if model.vision != "none":
            inputs["visual"] = torch.randn(b, IMAGE_TOKENS[model.vision], model.img_dim)
    return inputs
