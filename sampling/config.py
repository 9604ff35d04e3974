"""The settings that all commands of `python -m sampling` share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import storage, within
from configs.errors import UserError
from configs.files import require_other_files
from model.flow import FlowMatch
from model.limits import Precision, require_device
from model.world import Weights, WorldModel, WorldModelConfig, checkpoint_files, find_checkpoint, load_world
from sampling.denoising import Denoising


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A checkpoint and how it is loaded."""

    checkpoint: str  # a step folder, or a run folder: its newest complete step
    guidance: float = 1.0  # by actions: above 1 the picture answers more clearly, at twice the passes
    seed: int = within(0, 1 << 62, 0)
    mouse_deg: float = 3.0  # degrees per frame of turn_left, look_up, ...
    weights: Weights = "ema"
    device: str = "cpu"
    precision: Precision = "fp32"  # of the DiT's weights
    vision: str | None = None  # weights of CLIP's vision tower, for a model with vision
    codec: str | None = None  # the one that it was trained with, where it does not lie beside the checkpoint

    def find(self, outs: Sequence[str | Path], **read: str | Sequence[str] | None) -> str:
        """The url of the checkpoint. UserError if one of `outs` is a file of it or of something else that is `read`."""
        require_device(self.device)
        checkpoint = find_checkpoint(self.checkpoint)
        codec = self.codec and storage.files_at(self.codec)
        weights = {"vision": self.vision, "codec": codec, "checkpoint": checkpoint_files(checkpoint)}
        require_other_files(outs, {**read, **weights})
        return checkpoint

    def load(self, checkpoint: str) -> WorldModel:
        """The world model in a checkpoint that `find` gave."""
        return load_world(checkpoint, self.weights, self.device, self.precision, self.vision, self.codec)


def check_denoising(denoising: Denoising, trained: WorldModelConfig, checkpoint: str) -> None:
    """Raises UserError for steps that the checkpoint's model does not have."""
    FlowMatch(trained.flow).warp(denoising.few_steps)
    if not trained.model.causal and (denoising.few_steps or denoising.context_noise is not None):
        raise UserError(f"{checkpoint} is no causal model: leave out few_steps and context_noise")
