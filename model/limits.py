"""What can be asked for: sizes that a model can have, devices that are here."""

import math
import re
from typing import Literal

import torch
from torch.utils.benchmark import Timer

from configs.errors import UserError

WIDE, MANY = 1 << 17, 4096  # features of a layer; layers, heads and other things of which there are few
BELOW_1 = math.nextafter(1, 0)

Precision = Literal["fp32", "bf16", "auto"]  # auto: the faster one here
SPEEDUP = 1.15  # bf16 must be faster by this factor to be worth its rounding


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


def faster_precision(device: str) -> Precision:
    """bf16 on an accelerator; on the CPU the one whose product of the demo's size is faster.

    No flag of the processor says: of two that both have AVX-512 bf16, one multiplied it 2.2 times as fast as fp32, the
    other at half the speed.
    """
    if not device.startswith("cpu"):
        return "bf16"

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(1440, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        timer = Timer("x @ weight.T", globals={"x": x, "weight": weight}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.1).median

    return "bf16" if seconds(torch.float32) > SPEEDUP * seconds(torch.bfloat16) else "fp32"
