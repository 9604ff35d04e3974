"""The registry of objectives: a new one is a file and a line here."""

from typing import Any

from configs import build
from configs.errors import UserError
from model.config import ActionDiTConfig
from model.layout import Layout
from train.objectives.autoregressive import Autoregressive
from train.objectives.base import Base
from train.objectives.diffusion_forcing import DiffusionForcing
from train.objectives.objective import Objective
from train.objectives.teacher_forcing import TeacherForcing

OBJECTIVES: dict[str, type[Objective]] = {
    "base": Base,
    "autoregressive": Autoregressive,
    "diffusion_forcing": DiffusionForcing,
    "teacher_forcing": TeacherForcing,
}


def make_objective(settings: dict[str, Any]) -> Objective:
    """The objective that `settings['name']` names, with the other entries as its fields."""
    name = settings.get("name")
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UserError(f"objective.name={name!r}; there are: {', '.join(OBJECTIVES)}")
    fields = {key: value for key, value in settings.items() if key != "name"}
    return build(OBJECTIVES[name], fields, "objective.")


def check_objective(objective: Objective, model: ActionDiTConfig, layout: Layout, clip_latents: int) -> None:
    """Raises UserError if `objective` cannot train `model` on clips of `clip_latents` in `layout`."""
    causal = model.causal
    if (causal is not None) != objective.causal or layout != objective.layout:
        raise UserError(
            f"objective.name needs a model {'with' if objective.causal else 'without'} model.causal and clips of "
            f"layout {objective.layout}; the model is {'causal' if causal else 'not causal'}, the clips are {layout}"
        )
    if causal and (objective.loss_group != causal.block or clip_latents % causal.block):
        blocks = f"objective.block={objective.loss_group} and model.causal.block={causal.block}"
        raise UserError(f"{blocks} must be equal, and divide the clips' {clip_latents} latents")
