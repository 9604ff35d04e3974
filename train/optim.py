"""The optimizer: AdamW, or Muon for the blocks' matrices and AdamW for the rest; and the learning rate's course."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import OptimConfig
from train.state import MOMENTUM, ParamShard

BETA = 0.95  # of Muon's momentum; this and the next two lines as in torch.optim.Muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz
ITERATIONS, EPS = 5, 1e-7


def rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """What the learning rates are multiplied by in optimizer step `step` (from 0) of `steps`: it rises linearly to 1
    and falls linearly to 0."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = min(1.0, (steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return warmup * decay


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape before an engine cut it up."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for the model's parameter `name`."""
    return name.startswith("blocks.") and len(whole_shape(parameter)) == 2  # a modulation has three axes


def count_moments(model: nn.Module, config: OptimConfig) -> int:
    """Numbers of the optimizer's state: two by weight for AdamW, one for Muon."""
    muon = config.name == "muon"
    return sum((1 if muon and is_block_matrix(name, p) else 2) * p.numel() for name, p in model.named_parameters())


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix with about the singular vectors of `matrix` and singular values of 0.7 to 1.2, by five iterations of
    Newton and Schulz (kellerjordan.github.io/posts/muon)."""
    tall, (a, b, c) = matrix.size(0) > matrix.size(1), COEFFICIENTS
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonAdamW(torch.optim.AdamW):
    """The steps of torch.optim.Muon for the parameters in groups with `muon`, of AdamW for the others.

    Engines may cut matrices up. Each rank keeps the momentum of its own slices; they are put together for the matrix to
    be orthogonalised. DeepSpeed's own Muon (0.19) is not used: it clips what is orthogonalised already, and would train
    otherwise than one process does.
    """

    slices: dict[Tensor, list[tuple[ParamShard, torch.Size]]]  # by the optimizer's own tensor; the matrices' shapes

    def own(self, shards: Iterable[ParamShard], model: nn.Module, compute: Tensor, cut: bool) -> None:
        """Takes over the matrices among a rank's `shards` of `model`; they are orthogonalised on the device and in the
        dtype of `compute`. With `cut` other ranks have other parts of them. Comes before the first step."""
        parameters, self.slices, self.compute, self.cut = dict(model.named_parameters()), {}, compute, cut
        for shard in shards:
            if is_block_matrix(shard.name, parameters[shard.name]):
                matrix = shard, whole_shape(parameters[shard.name])
                self.slices.setdefault(shard.owner, []).append(matrix)
                self.state[shard.owner] = {MOMENTUM: torch.zeros_like(shard.owner)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for owner in group["params"] if group["muon"] else ():
                if owner.grad is not None:
                    for shard, shape in self.slices[owner]:
                        self._step_matrix(shard, shape, shard.of(owner.grad), group)

    def _step_matrix(self, shard: ParamShard, shape: torch.Size, gradient: Tensor, group: dict[str, Any]) -> None:
        """All ranks must call, those with an empty slice too."""
        momentum = shard.moment(self, MOMENTUM)
        momentum.lerp_(gradient, 1 - BETA)
        whole = self.compute.new_zeros(shape.numel())
        own = slice(shard.start, shard.start + len(gradient))
        whole[own] = gradient.lerp(momentum, BETA)
        if self.cut:
            dist.all_reduce(whole)  # of numbers and zeros: exact
        if len(gradient):
            update = orthogonalised(whole.view(shape)).flatten()[own]
            weight = shard.of(shard.owner)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            # As large as AdamW's steps: "match_rms_adamw", arXiv 2502.16982, eq. 4.
            weight.add_(update.to(weight.device), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of the trainable weights; `peak_lr` of a group is what `rate_factor` multiplies. Weight decay is on
    matrices, not on biases, norms and modulations."""
    block_matrices, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad and config.name == "muon" and is_block_matrix(name, p):
            block_matrices.append(p)
        elif p.requires_grad:
            decays = len(whole_shape(p)) >= 2 and not name.endswith("modulation")
            (matrices if decays else vectors).append(p)
    kinds = [(matrices, config.learning_rate, config.weight_decay), (vectors, config.learning_rate, 0.0)]
    if config.name == "muon":
        kinds.append((block_matrices, config.matrix_learning_rate, config.weight_decay))
    groups = [
        {"params": inside, "lr": rate, "peak_lr": rate, "weight_decay": decay, "muon": inside is block_matrices}
        for inside, rate, decay in kinds
    ]
    kind = MuonAdamW if config.name == "muon" else torch.optim.AdamW
    return kind(groups, betas=config.betas, eps=1e-8, fused=True)
