"""The model against the reference's recorded outputs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from configs.cli import Verb, run
from data_pipeline.types import Actions
from sampling.scripts import random_play
from tests.parity.actions import CASES as SAMPLING_CASES
from tests.parity.fixtures import Fixture, read_fixtures, run_fixture
from tests.parity.network import CASES
from tests.parity.run import parity

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = {fixture.case: fixture for fixture in read_fixtures(GOLDEN)}
SUPPORTED = [case for case in FIXTURES if case.startswith((*CASES, *SAMPLING_CASES))]


@pytest.mark.parametrize("case", SUPPORTED)
def test_every_output_agrees_with_the_reference(case: str) -> None:
    rows = run_fixture(FIXTURES[case], CASES | SAMPLING_CASES)
    assert [row for row in rows if row.verdict == "FAIL"] == []
    assert any(row.verdict == "ok" for row in rows)


def test_only_the_step_to_each_samples_own_level_differs_by_design() -> None:
    rows = [row for case in SUPPORTED for row in run_fixture(FIXTURES[case], CASES | SAMPLING_CASES)]
    differing = {row.output.partition(".")[2] for row in rows if row.verdict == "differs by design"}
    assert differing == {"step_with_last"}


def test_every_recorded_output_is_judged() -> None:
    rows = [row for fixture in FIXTURES.values() for row in run_fixture(fixture, CASES | SAMPLING_CASES)]
    assert [(row.case, row.output) for row in rows if row.verdict == "not supported"] == []


def test_an_output_that_nothing_computes_is_named() -> None:
    fixture = FIXTURES["action_both"]
    surprising = replace(fixture, tensors=fixture.tensors | {"out.surprise": fixture.tensors["out.full"]})
    rows = run_fixture(surprising, CASES)
    assert [row.output for row in rows if row.verdict == "not supported"] == ["surprise"]
    assert [row.verdict for row in run_fixture(replace(fixture, case="unheard_of"), CASES)][-1] == "not supported"


def test_a_wrong_number_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_with(tmp_path, FIXTURES["action_both"], "out.full", 1e-3)
    assert run("model", {"parity": Verb(parity)}, ["parity", str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_not_a_number_fails_the_command(tmp_path: Path) -> None:
    copy_with(tmp_path, FIXTURES["time_sinusoid"], "out.sin_32", float("nan"))
    assert run("model", {"parity": Verb(parity)}, ["parity", str(tmp_path)]) == 1


def test_an_exact_folder_passes_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_with(tmp_path, FIXTURES["rope"], "out.rope_d24_start0", 0.0)
    copy_with(tmp_path, FIXTURES["time_sinusoid"], "out.surprise", 0.0)
    assert run("model", {"parity": Verb(parity)}, ["parity", str(tmp_path)]) == 0
    assert " ok" in capsys.readouterr().out


def test_a_folder_without_fixtures_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["parity"], ["parity", str(tmp_path / "missing")], ["parity", str(tmp_path)]):
        assert run("model", {"parity": Verb(parity)}, words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_fixture_whose_weights_are_missing_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_with(tmp_path, FIXTURES["bidir_universal"], "out.flow_0", 0.0)
    assert run("model", {"parity": Verb(parity)}, ["parity", str(tmp_path)]) == 2
    assert "bidir_universal.weights.safetensors" in capsys.readouterr().err


def test_random_play_holds_each_entry_for_a_segment_and_repeats_by_seed() -> None:
    table = [Actions(np.array([keys]), np.array([mouse])) for keys, mouse in (((1, 0), (0, 1)), ((0, 1), (0, -1)))]
    play = random_play(table, 30, seed=3, segment=5)
    assert play.keyboard.shape == (30, 2) and play.mouse.shape == (30, 2)
    for start in (1, 6, 11, 26):
        assert (play.keyboard[start : start + 5] == play.keyboard[start]).all()
    assert (random_play(table, 30, seed=3, segment=5).mouse == play.mouse).all()
    assert random_play([Actions(np.ones((1, 1)), np.ones((1, 0)))], 4, seed=0).mouse.shape == (4, 0)


def copy_with(folder: Path, fixture: Fixture, output: str, added: float) -> None:
    """`fixture` in `folder`, with `added` on top of one expected output."""
    shutil.copy(GOLDEN / f"{fixture.case}.json", folder)
    assert json.loads((folder / f"{fixture.case}.json").read_text())["case"] == fixture.case
    tensors = {name: tensor + added if name == output else tensor for name, tensor in fixture.tensors.items()}
    save_file(tensors, folder / f"{fixture.case}.safetensors")
