"""`python -m launch warm`: the one compilation that a first start on a CPU would wait for."""

import os


def warm(args: list[str]) -> None:
    """Compile what DeepSpeed compiles at its first start on a CPU, so that no run waits for it."""
    import torch

    if torch.cuda.is_available():
        return  # no such step on an accelerator
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    assert builder is not None
    builder.load(verbose=False)
