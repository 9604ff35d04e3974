"""The model against the reference's recorded outputs."""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_released import model_command

from tests.parity.fixtures import Fixture, Row, read_fixtures, run_fixture
from tests.parity.run import CASES

GOLDEN = Path(__file__).parent / "golden"
FIXTURES = {fixture.case: fixture for fixture in read_fixtures(GOLDEN)}


@cache
def rows_of(case: str) -> list[Row]:
    return run_fixture(FIXTURES[case], CASES)


@pytest.mark.parametrize("case", FIXTURES)
def test_every_recorded_output_agrees_with_the_reference(case: str) -> None:
    assert [row for row in rows_of(case) if row.verdict in ("FAIL", "not supported")] == []
    assert any(row.verdict == "ok" for row in rows_of(case))


def test_only_the_step_to_each_samples_own_level_differs_by_design() -> None:
    rows = [row for case in FIXTURES for row in rows_of(case) if row.verdict == "differs by design"]
    assert {row.output.partition(".")[2] for row in rows} == {"step_with_last"}


def test_an_output_that_nothing_computes_is_named() -> None:
    fixture = FIXTURES["action_both"]
    surprising = replace(fixture, tensors=fixture.tensors | {"out.surprise": fixture.tensors["out.full"]})
    assert [row.output for row in run_fixture(surprising, CASES) if row.verdict == "not supported"] == ["surprise"]
    assert run_fixture(replace(fixture, case="unheard_of"), CASES)[-1].verdict == "not supported"


@pytest.mark.parametrize(
    ("case", "output", "added", "status", "printed"),
    [
        ("rope", "out.rope_d24_start0", 0.0, 0, " ok"),
        ("time_sinusoid", "out.surprise", 0.0, 0, " ok"),
        ("action_both", "out.full", 1e-3, 1, "FAIL"),
        ("time_sinusoid", "out.sin_32", float("nan"), 1, "FAIL"),
        ("bidir_universal", "out.flow_0", 0.0, 2, "bidir_universal.weights.safetensors"),  # which are missing
    ],
)
def test_the_command_judges_a_folder(
    tmp_path: Path, case: str, output: str, added: float, status: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_with(tmp_path, FIXTURES[case], output, added)
    assert model_command("parity", str(tmp_path)) == status
    assert printed in "".join(capsys.readouterr())


def test_a_folder_without_fixtures_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folders in ([], [str(tmp_path / "missing")], [str(tmp_path)]):
        assert model_command("parity", *folders) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def copy_with(folder: Path, fixture: Fixture, output: str, added: float) -> None:
    """`fixture` in `folder`, with `added` on top of one expected output."""
    shutil.copy(GOLDEN / f"{fixture.case}.json", folder)
    tensors = {name: tensor + added if name == output else tensor for name, tensor in fixture.tensors.items()}
    save_file(tensors, folder / f"{fixture.case}.safetensors")
