"""`python -m data_pipeline <verb> file.yaml ... key=value ...`."""

import sys

from configs import load_config
from configs.cli import run
from data_pipeline.record import RecordConfig, record_episodes


def record(words: list[str]) -> None:
    """Play ViZDoom headless with a scripted explorer and write episodes: GAME.yaml out= episodes= seed="""
    config = load_config(RecordConfig, words)
    done = record_episodes(config)
    minutes = done.frames / config.game.fps / 60
    print(
        f"recorded {done.episodes} episodes ({done.made} new), {done.frames} frames, {minutes:.1f} minutes of play "
        f"in {done.seconds:.1f} s -> {config.out}"
    )


VERBS = {"record": record}

if __name__ == "__main__":
    sys.exit(run("data_pipeline", VERBS))
