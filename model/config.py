"""What a YAML file of configs/models holds."""

from dataclasses import dataclass, field

from model.action_dit import ActionDiTConfig
from model.flow import FlowMatchConfig


@dataclass(frozen=True)
class ModelConfig:
    """A model and the flow that it is trained and sampled with."""

    model: ActionDiTConfig
    flow: FlowMatchConfig = field(default_factory=FlowMatchConfig)
