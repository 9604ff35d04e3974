"""Ranks that are not there, and what torch and DeepSpeed are told so that they go on without them, and without data."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

import train.fsdp2
from train.config import TrainConfig


@contextmanager
def launched_here(config: TrainConfig, ranks: int) -> Iterator[None]:
    """The environment that a launcher gives rank 0 of `ranks` on a CPU. It stays: this process is that rank."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    deepspeed = config.engine.name == "deepspeed"
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if deepspeed or ranks > 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    yield


@contextmanager
def pretended_ranks(config: TrainConfig, ranks: int) -> Iterator[None]:
    """Within the block this process is rank 0 of `ranks`, and no exchange waits for the others. DDP is as one rank."""
    ranks = 1 if config.engine.name == "ddp" else ranks
    with ExitStack() as stack:
        stack.enter_context(launched_here(config, ranks))
        if config.engine.name != "ddp":
            dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        stack.enter_context(replaced(nn.Module, "_apply", change_tensors))
        stack.enter_context(replaced(train.fsdp2, "init_device_mesh", mesh_with_numbers(train.fsdp2.init_device_mesh)))
        if config.engine.name == "deepspeed":
            from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

            # It compares what ranks say, and those that are not there say nothing.
            stack.enter_context(replaced(coordinator, "assert_ints_same_as_other_ranks", lambda ints: None))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def mesh_with_numbers(make: Callable[..., Any]) -> Callable[..., Any]:
    """torch finds a rank's place in a mesh by looking at numbers."""

    def made(*given: Any) -> Any:
        with unset_fake_temporarily():
            return make(*given)

    return made


def change_tensors(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which moves and casts a module's tensors. For tensors without data torch's own swaps them with
    new ones, which it refuses for those of a module that was just built."""
    if recurse:
        for child in module.children():
            child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = change(parameter.data)
        if changed.device == parameter.device:
            parameter.data = changed
        else:  # from the meta device, or back to it
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
