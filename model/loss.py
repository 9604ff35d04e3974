"""The training loss: the squared error of the velocity."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.flow import FlowMatch
from model.inputs import condition, condition_on_last, model_inputs, with_mask
from model.layout import Layout

SIGMA_BINS = 4  # of equal width over [0, 1]


class Clips(Protocol):
    """A batch of clips; data_pipeline's `Batch` is one."""

    @property
    def latents(self) -> Tensor: ...  # (b c f h w)

    @property
    def keyboard(self) -> Tensor: ...  # (b n k)

    @property
    def mouse(self) -> Tensor: ...  # (b n 2)

    @property
    def visual(self) -> Tensor | None: ...  # (b m c), image tokens of the first frame

    @property
    def image_latents(self) -> Tensor | None: ...  # (b c f h w), of the first frame followed by grey


@dataclass(frozen=True)
class NoiseSample:
    """Noise levels and noise of a batch; the same for all action variants, so that their losses can be subtracted."""

    sigma: Tensor  # (b), or (b f) for a model that takes one per latent frame
    noise: Tensor  # (b c f h w)
    past: "NoiseSample | None" = None  # of a past of its own, beside the noisy clip: teacher forcing


def velocity_error(
    dit: nn.Module, flow: FlowMatch, clips: Clips, known: int, sample: NoiseSample, layout: Layout = "chunked"
) -> Tensor:
    """Mean squared velocity error (b f) of every latent frame, the first `known` of which the model is given.

    Known latents are noised like all others in the model's input and clean in its conditioning; with `image_latents`
    these are the conditioning. With a `sample.past` every block follows from that past alone, in one pass over both.
    """
    x0, past = clips.latents.float(), sample.past or sample
    noisy, before = (flow.add_noise(x0, noise.noise, noise.sigma) for noise in (sample, past))
    cond = conditioning(dit, clips, known, before, past.sigma)
    inputs = model_inputs(dit, (clips.keyboard, clips.mouse), layout, cond, clips.visual)
    sigma, doubled = sample.sigma, sample.past is not None
    if doubled:
        noisy, sigma = torch.cat([before, noisy], dim=2), torch.cat([past.sigma, sigma], dim=1)
        for name in ("cond", "keyboard", "mouse"):
            if (once := inputs[name]) is not None:
                inputs[name] = torch.cat([once, once], dim=2 if name == "cond" else 1)
    velocity = dit(noisy, flow.config.train_steps * sigma, **inputs, doubled=doubled)[:, :, -x0.shape[2] :]
    error = (velocity.float() - flow.training_target(x0, sample.noise)).square()
    return error.mean(dim=(1, 3, 4))


def conditioning(dit: nn.Module, clips: Clips, known: int, past: Tensor, sigma: Tensor) -> Tensor:
    """The conditioning (b 4+c f h w) of the model's kind, for a past (b c f h w) that is noised to `sigma` (b f)."""
    unwrapped: Any = getattr(dit, "module", dit)  # a training engine may wrap it
    causal, x0 = unwrapped.config.causal, clips.latents.float()
    if causal and causal.unknown == "last":
        return condition_on_last(x0[:, :, :1], past, sigma.expand(len(x0), -1), causal.block)
    return condition(x0, known) if clips.image_latents is None else with_mask(clips.image_latents.float(), 1)


def velocity_loss(
    dit: nn.Module, flow: FlowMatch, clips: Clips, known: int, sample: NoiseSample, layout: Layout = "chunked"
) -> Tensor:
    """Mean squared velocity error (b) of the latents after the first `known`."""
    return velocity_error(dit, flow, clips, known, sample, layout)[:, known:].mean(dim=1)


def sigma_bins(flow: FlowMatch) -> list[tuple[str, Tensor]]:
    """The training levels in bins of sigma: names such as `sigma_0.75-1.00`, levels (n); empty bins are left out."""
    levels = flow.schedule(flow.config.train_steps).sigmas
    index = (levels * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)
    names = [f"sigma_{i / SIGMA_BINS:.2f}-{(i + 1) / SIGMA_BINS:.2f}" for i in range(SIGMA_BINS)]
    return [(names[i], levels[index == i]) for i in range(SIGMA_BINS) if (index == i).any()]
