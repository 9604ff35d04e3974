"""What can be asked for: sizes that a model can have, devices that are here."""

import math
import re

import torch

from configs.errors import UserError

WIDE, MANY = 1 << 17, 4096  # features of a layer; layers, heads and other things of which there are few
BELOW_1 = math.nextafter(1, 0)


def require_between(where: str, least: float, most: float, **numbers: float) -> None:
    """Refuses the first of `numbers`, called `where` and its name, that is outside."""
    for name, number in numbers.items():
        if not least <= number <= most:
            raise UserError(f"{where}{name}={number} must be {least} to {most}")


def require_device(device: str) -> None:
    """Refuses a `device` that is neither cpu nor a GPU that is here: cuda, cuda:1, mps."""
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    name = re.fullmatch(r"(cpu|cuda|mps)(?::([0-9]{1,3}))?", device)
    if not name:
        raise UserError(f"device={device!r} must be cpu, cuda, cuda:N or mps")
    if int(name[2] or 0) >= here[name[1]]:
        raise UserError(f"device={device}: this machine has {here[name[1]]} of them; use device=cpu")
