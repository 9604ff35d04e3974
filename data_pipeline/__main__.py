"""`python -m data_pipeline <verb> file.yaml ... key=value ...`."""

import sys

from configs.cli import Verb, run

VERBS = {
    "record": Verb("data_pipeline.commands:record"),
    "doctor": Verb("data_pipeline.doctor.examine:doctor"),
    "encode": Verb("data_pipeline.commands:run_encode"),
    "verify": Verb("data_pipeline.verify:verify", first="manifest"),
    "repair": Verb("data_pipeline.commands:repair"),
    "inspect": Verb("data_pipeline.inspect:inspect", first="manifest"),
    "bench": Verb("tests.bench.loader:bench", first="manifest"),
    "bench-encode": Verb("tests.bench.encoding:bench_encode"),
}

if __name__ == "__main__":
    sys.exit(run("data_pipeline", VERBS))
