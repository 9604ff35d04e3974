"""`python -m launch configs/machines/X.yaml configs/train/Y.yaml ...` starts a run; `road` the whole road."""

import sys

from configs.cli import Verb, run

VERBS = {
    "run": Verb("launch.local:launch"),
    "doctor": Verb("launch.doctor:doctor"),
    "plan": Verb("launch.plan:plan"),
    "links": Verb("launch.links:links"),
    "accelerate": Verb("launch.rendezvous:accelerate"),
    "road": Verb("launch.road:road"),
    "warm": Verb("launch.warm:warm"),
}

if __name__ == "__main__":
    sys.exit(run("launch", VERBS, default="run"))
