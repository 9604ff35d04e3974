"""Machine and words of a run -> the exact line of `accelerate launch`. Nothing is started here."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.errors import UserError
from launch.machine import MachineConfig, is_text
from train.config import EngineConfig

TRAINERS = "^[^ ]*python[^ ]* (-[a-z]+ )*-m train"  # how their lines begin; their launcher's ends like theirs
MARK = "# Rendered by: python -m launch"  # a line of every file that is written for a scheduler


class Shell(str):
    """Text that is shell already. Every other text is quoted when a line of shell is made of it."""


def variable(name: str) -> Shell:
    """What a variable of the node's environment holds, as one word."""
    return Shell(f'"${name}"')


def quoted(word: str) -> Shell:
    """`word` as shell. Raises ValueError for one that no script can hold."""
    if isinstance(word, Shell):
        return word
    if not is_text(word):
        raise UserError(f"{word!r} is no text that a script can hold; rename the file or change the value")
    return Shell(shlex.quote(word))


@dataclass(frozen=True)
class Task:
    """What a scheduler is to run on every node."""

    name: str  # of the job
    line: Callable[[str, str], list[str]]  # of a node's number and node 0's host
    out: str | None = None  # folder of a run that is queued again when it was stopped; none: it runs once
    most_s: float = 0.0  # the longest that what runs once takes


def accelerate_words(
    machine: MachineConfig,
    engine: EngineConfig,
    words: Sequence[str],
    rank: str | None = None,
    host: str | None = None,
    program: Sequence[str] = ("train",),
) -> list[str]:
    """The argument list of one node. `rank` and `host` are what a scheduler's script puts in their places.

    Accelerate only starts the processes: what DeepSpeed or FSDP2 do comes from the training config (train/engine.py).
    """
    given = [
        "python",
        "-m",
        "launch",
        "accelerate",
        "--num_processes",
        str(machine.ranks),
        "--num_machines",
        str(machine.nodes),
    ]
    if machine.nodes > 1:
        given += ["--machine_rank", rank or str(machine.node_rank), "--main_process_ip", host or machine.host]
    given += ["--main_process_port", str(machine.port)]
    if engine.name == "deepspeed":
        # DeepSpeed's own launchers go over ssh; `standard` is torch's, as everywhere else.
        given += ["--use_deepspeed", *(["--deepspeed_multinode_launcher", "standard"] if machine.nodes > 1 else [])]
    elif machine.ranks > 1:
        given += ["--multi_gpu"]  # on a CPU too: Accelerate starts one process otherwise
    # Stated, because Accelerate's default config file may say something else on one of the nodes.
    return [*given, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", *program, *words]


def environment(machine: MachineConfig) -> dict[str, str]:
    """Of every process."""
    # A machine with GPUs that is to use its CPU must not see them: torch would take them.
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    return {**(cpu if machine.device == "cpu" else {}), "TOKENIZERS_PARALLELISM": "false", **machine.env}


def shell_line(words: Sequence[str]) -> str:
    """The words as a line of shell, which becomes the launcher.

    The launcher ignores USR1, so that a warning which every process gets reaches those that can save.
    """
    return f"trap '' USR1; exec {' '.join(map(quoted, words))}"
