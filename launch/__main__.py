"""`python -m launch configs/machines/X.yaml configs/train/Y.yaml ...` starts a run; `pipeline` a whole pipeline."""

import sys

from configs.cli import Verb, run

VERBS = {
    "run": Verb("launch.run:launch"),
    "doctor": Verb("launch.doctor:doctor"),
    "plan": Verb("launch.plan:plan"),
    "accelerate": Verb("launch.rendezvous:accelerate"),
    "pipeline": Verb("launch.pipeline:pipeline"),
}

if __name__ == "__main__":
    sys.exit(run("launch", VERBS, default="run"))
