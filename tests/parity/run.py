"""`python -m model parity DIR`: every fixture of a folder, judged."""

from collections import Counter
from pathlib import Path

import torch

from configs.errors import UserError
from tests.parity.actions import actions, pipeline
from tests.parity.causal import action_module, causal_stream, causal_train
from tests.parity.codec import clip, vae
from tests.parity.fixtures import Case, Row, read_fixtures, run_fixture
from tests.parity.network import bidirectional, preprocess, rope, scheduler, time_embedding

# By the start of the case's name.
CASES: dict[str, Case] = {
    "scheduler": scheduler, "time_sinusoid": time_embedding, "rope": rope, "action_": action_module,
    "bidir_": bidirectional, "causal_train_": causal_train, "causal_stream_": causal_stream, "preprocess": preprocess,
    "vae": vae, "clip": clip, "actions": actions, "pipeline_": pipeline,
}  # fmt: skip


def parity(args: list[str]) -> int:
    """Compares the model with the fixtures in a folder and says how far each output is from the reference's: DIR"""
    if len(args) != 1 or not Path(args[0]).is_dir():
        raise UserError(f"give one folder of fixtures, not {' '.join(args) or 'nothing'!r}")
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = [row for fixture in read_fixtures(Path(args[0])) for row in run_fixture(fixture, CASES)]
    judged = [row for row in rows if row.verdict != "not supported"]
    if not judged:
        raise UserError(f"no fixture in {args[0]} is of a kind that can be judged yet")
    width = max(len(row.output) for row in judged)
    print(f"{'case':<24} {'output':<{width}} {'error':>10} {'tolerance':>10}  verdict")
    for row in judged:
        print(f"{row.case:<24} {row.output:<{width}} {row.error:>10.2e} {row.tolerance:>10.2e}  {row.verdict}")
    _summarise(rows)
    return 1 if any(row.verdict == "FAIL" for row in rows) else 0


def _summarise(rows: list[Row]) -> None:
    print()
    for case in dict.fromkeys(row.case for row in rows):
        outputs = [row.output for row in rows if row.case == case and row.verdict == "not supported"]
        if outputs:
            print(f"not supported yet: {case}: {', '.join(outputs)}")
    verdicts = Counter(row.verdict for row in rows)
    print("; ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
