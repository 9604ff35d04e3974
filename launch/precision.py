"""In which precision this machine's processor multiplies faster."""

import time
from pathlib import Path
from typing import Literal, get_args

from configs.errors import UserError
from configs.files import write_text

Precision = Literal["fp32", "bf16"]
GAIN = 1.15  # bf16 must be faster by this factor, or it is not worth its rounding


def precision_of_road(folder: str | Path) -> Precision:
    """The faster one, measured once per `folder`: a stage that goes on must not change its precision.

    Raises ValueError in one line for a damaged file.
    """
    path = Path(folder) / "precision"
    if path.is_file():
        for precision in get_args(Precision):
            if path.read_bytes().strip() == precision.encode():
                return precision
        raise UserError(
            f"{path} holds neither {' nor '.join(get_args(Precision))}; write there what the road began with"
        )
    found = faster_precision()
    write_text(path, found + "\n")
    return found


def faster_precision() -> Precision:
    """bf16 on an accelerator, else what a product of the demo's size says.

    No flag of the processor tells: of two that both have AVX-512 bf16, one multiplied it 2.2 times as fast as fp32,
    the other at half the speed.
    """
    import torch  # costs a second

    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1440, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        runs = []
        for _ in range(20):
            started = time.perf_counter()
            torch.mm(x, weight.T)
            runs.append(time.perf_counter() - started)
        seconds[dtype] = sorted(runs)[5]  # a quiet one: others may be at work
    return "bf16" if seconds[torch.float32] > GAIN * seconds[torch.bfloat16] else "fp32"
