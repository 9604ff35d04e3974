"""The verbs `python -m train run` and `engine`."""

import json
import os
import signal
import time

from configs import load_config
from configs.errors import is_users
from train.config import TrainConfig
from train.engines import engine_of
from train.exit import ASKED, FAULT, needs_a_person, report_exit
from train.loop import train


def run(args: list[str]) -> None:
    """Train a world model on latent shards (the default: an argument that is no verb begins its settings)."""
    try:
        if train(load_config(TrainConfig, args)):
            report_exit(ASKED)
    except (ValueError, OSError) as error:
        if is_users(error):
            if needs_a_person(error):
                report_exit(FAULT)
            # Every rank meets the same error: rank 0 prints it, and the launcher ends the others while they wait here.
            if os.environ.get("RANK", "0") != "0":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(5)
        raise


def print_engine(config: TrainConfig) -> None:
    """Print the settings of a run's engine without starting it: the same arguments as for training"""
    print(json.dumps({config.engine.name: engine_of(config).settings(config)}, indent=2))
