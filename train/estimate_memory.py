"""How much memory a run needs: states by their sizes, activations by a pass on tensors without data."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs import storage
from configs.errors import UserError
from data_pipeline.shards import load_manifest
from data_pipeline.types import Manifest
from model.action_dit import ActionDiT, ActionDiTConfig
from model.cost import counted_dit, random_inputs, run_clip, training_flops
from model.masks import dense_mask
from train.config import TrainConfig
from train.engines import engine_of
from train.objectives import check_objective, make_objective
from train.optim import count_moments

CPU = torch.device("cpu")

Size = tuple[int, int, int]  # latents of a clip, rows and columns of each


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one rank of a run, and what it computes per step."""

    bytes: dict[str, int]  # by purpose, at the peak
    parameters: int  # of the whole model
    tokens: int  # of video, per step
    flops: int  # per step; what checkpointing computes again is not counted

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors made under this mode: its peak, and the peak without the model's gradients."""

    def __init__(self, dit: ActionDiT, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.gradients = self.peak = self.peak_without_gradients = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in (*dit.parameters(), *dit.buffers(), *inputs)}
        for parameter in dit.parameters():
            parameter.register_post_accumulate_grad_hook(self._add_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._storages:
                self._storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        self.peak_without_gradients = max(self.peak_without_gradients, self.now - self.gradients)
        return out

    def _add_gradient(self, parameter: Tensor) -> None:
        self.gradients += parameter.nbytes

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


def estimate_memory(config: TrainConfig, clip: Size, ranks: int, on_cpu: bool) -> MemoryEstimate:
    """One of `ranks` in a training step. Raises UserError for an engine that there is not."""
    model, b, engine = config.model, config.batch, engine_of(config)
    latents, rows, columns = clip
    objective = make_objective(config.objective)
    size = (b, objective.copies * (objective.latents or latents), rows, columns)
    dit = counted_dit(model)
    parameters, moments = sum(p.numel() for p in dit.parameters()), count_moments(dit, config.optim)
    sizes = engine.state_bytes(config, parameters, moments, ranks, on_cpu)
    sizes["average"] = 4 * parameters // (ranks if engine.all_write_state else 1)
    live = live_bytes(model, size, config.engine.precision == "bf16")
    sizes["activations"] = live.peak - live.gradients  # at the end of the backward pass
    if live.peak_without_gradients > sizes["activations"] + sizes["gradients"]:  # the peak is where it begins
        sizes |= {"activations": live.peak_without_gradients, "gradients": 0}
    if on_cpu:
        sizes["baseline RSS"] = psutil.Process().memory_info().rss
        if config.checkpoint.background or storage.is_s3(config.out):
            sizes["checkpoint"] = sizes["average"] * 4
    _, p, q = model.patch_size
    tokens = b * size[1] * (rows // p) * (columns // q)
    flops = training_flops(model, *size)
    return MemoryEstimate(sizes, parameters, config.accumulation * tokens, config.accumulation * flops)


def live_bytes(model: ActionDiTConfig, size: tuple[int, int, int, int], bf16: bool) -> LiveBytes:
    """The memory of a forward and backward pass over clips of `size` (b f h w) besides the weights."""
    attention = "dense" if model.attention == "dense" else "sdpa"  # as large as the others, and needs no accelerator
    dtype = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16 if bf16 else torch.float32)
        try:
            dit = ActionDiT(replace(model, attention=attention))
        finally:
            torch.set_default_dtype(dtype)
        inputs = random_inputs(model, *size, CPU)
        with LiveBytes(dit, inputs.values()) as live:
            run_clip(dit, inputs, train=True)
    dense_mask.cache_clear()  # the masks that it keeps have no data
    return live


def clip_size(config: TrainConfig, height: int | None, width: int | None, latents: int | None) -> Size:
    """The size of the run's clips: `latents` latents of `height` x `width` px, and the manifest's where one is None."""
    objective = make_objective(config.objective)
    layout, spatial = objective.layout, Manifest.spatial
    if height is None or width is None or latents is None:
        manifest = load_manifest(config.sources[0].path)
        height, width = height or manifest.game.height, width or manifest.game.width
        layout, spatial = manifest.layout, manifest.spatial
        latents = latents or manifest.clip_latents
    if min(height, width, latents) < 1 or height % spatial or width % spatial:
        raise UserError(
            f"height={height} and width={width} must be multiples of {spatial} px, latents={latents} 1 or more"
        )
    check_objective(objective, config.model, layout, latents)
    return latents, height // spatial, width // spatial
