"""The registry of objectives: a new one is a file and a line here."""

from typing import Any

from configs import build
from configs.errors import UserError
from model.config import ActionDiTConfig
from model.layout import Layout
from train.objectives.autoregressive import Autoregressive
from train.objectives.base import Base
from train.objectives.diffusion_forcing import DiffusionForcing

OBJECTIVES = {"base": Base, "autoregressive": Autoregressive, "diffusion_forcing": DiffusionForcing}
Objective = Base | Autoregressive | DiffusionForcing


def make_objective(settings: dict[str, Any]) -> Objective:
    """The objective that `settings['name']` names, with the other entries as its fields."""
    name = settings.get("name")
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UserError(f"objective.name={name!r}; there are: {', '.join(OBJECTIVES)}")
    fields = {key: value for key, value in settings.items() if key != "name"}
    return build(OBJECTIVES[name], fields, "objective.")


def check_objective(objective: Objective, model: ActionDiTConfig, layout: Layout, clip_latents: int) -> None:
    """Raises ValueError in one line if `objective` cannot train `model` on clips of `layout` and `clip_latents`."""
    causal = model.causal
    forcing = objective if isinstance(objective, DiffusionForcing) else None
    wants = ("a model with", "continuous") if forcing else ("a model without", "chunked")
    if (causal is None) != (forcing is None) or layout != wants[1]:
        raise UserError(
            f"this objective trains {wants[0]} a `causal` section on clips of layout {wants[1]}; the model is "
            f"{'causal' if causal else 'not causal'} and the clips are {layout}: change objective.name "
            "(diffusion_forcing is the causal one), model.causal or the manifest"
        )
    if forcing and causal and (forcing.block != causal.block or clip_latents % causal.block):
        raise UserError(
            f"objective.block={forcing.block}, model.causal.block={causal.block}, clips of {clip_latents} latents: the "
            "two must be equal and divide the clips"
        )


def figure_block(objective: Objective) -> int:
    """How many latents one figure of loss by place stands for: those that share a noise level of their own."""
    return objective.block if isinstance(objective, DiffusionForcing) else 1
