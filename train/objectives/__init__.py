"""The registry of objectives: a new one is a file and a line here."""

from typing import Any

from configs import build
from train.objectives.autoregressive import Autoregressive
from train.objectives.base import Base

OBJECTIVES = {"base": Base, "autoregressive": Autoregressive}
Objective = Base | Autoregressive


def make_objective(settings: dict[str, Any]) -> Objective:
    """The objective that `settings['name']` names, with the other entries as its fields."""
    name = settings.get("name")
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name={name!r}; there are: {', '.join(OBJECTIVES)}")
    fields = {key: value for key, value in settings.items() if key != "name"}
    return build(OBJECTIVES[name], fields, "objective.")
