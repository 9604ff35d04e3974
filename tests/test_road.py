"""A road: stages that are done are reused, and all of them compute in one precision."""

from pathlib import Path

import pytest

from launch.precision import faster_precision
from launch.road import STAMPS, road

ROAD = """
out: {out}
opens: {out}/b
precision: auto
stages:
  - {{name: a, command: 'python -c "print(file=open(\\"{out}/a\\", \\"a\\"))"', makes: '{out}/a'}}
  - {{name: b, command: 'python -c "print(\\"${{precision}}\\", file=open(\\"{out}/b\\", \\"a\\"))"', makes: '{out}/b'}}
"""


@pytest.fixture
def a_road(tmp_path: Path) -> str:
    path = tmp_path / "road.yaml"
    path.write_text(ROAD.format(out=tmp_path))
    return str(path)


def test_done_stages_are_reused_until_one_before_them_changes(a_road: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert road([a_road, "precision=fp32"]) == 0
    assert (tmp_path / "a").read_text() == "\n"
    assert (tmp_path / "b").read_text() == "fp32\n"
    (tmp_path / "a").unlink()
    assert road([a_road, "precision=fp32"]) == 0
    assert (tmp_path / "b").read_text() == (tmp_path / "b.1").read_text() == "fp32\n"


def test_a_changed_yaml_file_sets_aside_what_was_made_with_it(tmp_path: Path) -> None:
    settings, out = tmp_path / "settings.yaml", tmp_path / "made"
    settings.write_text("steps: 1")
    command = f'sh -c "cat {settings} >> {out}" {settings}'
    given = f"out: {tmp_path}\nopens: x\nprecision: fp32\nstages: [{{name: a, command: '{command}', makes: {out}}}]"
    (tmp_path / "road.yaml").write_text(given)
    for _ in range(2):
        assert road([str(tmp_path / "road.yaml")]) == 0
    assert out.read_text() == "steps: 1"
    settings.write_text("steps: 2")
    assert road([str(tmp_path / "road.yaml")]) == 0
    assert out.read_text() == "steps: 2" and (tmp_path / "made.1").read_text() == "steps: 1"


def test_a_stage_that_was_stopped_goes_on_with_what_it_has(tmp_path: Path) -> None:
    out, go = tmp_path / "made", tmp_path / "go"
    command = f'sh -c "echo part >> {out}; test -e {go}"'
    given = f"out: {tmp_path}\nopens: x\nprecision: fp32\nstages: [{{name: a, command: '{command}', makes: {out}}}]"
    (tmp_path / "road.yaml").write_text(given)
    assert road([str(tmp_path / "road.yaml")]) == 1
    go.touch()
    assert road([str(tmp_path / "road.yaml")]) == 0
    assert out.read_text() == "part\npart\n" and not (tmp_path / "made.1").exists()


def test_the_precision_is_measured_once_and_kept(a_road: str, tmp_path: Path) -> None:
    assert road([a_road]) == 0
    found = (tmp_path / STAMPS / "precision").read_text().strip()
    assert (tmp_path / "b").read_text().strip() == found in ("fp32", "bf16")
    other = {"fp32": "bf16", "bf16": "fp32"}[found]
    (tmp_path / STAMPS / "precision").write_text(other)
    assert road([a_road]) == 0
    assert (tmp_path / "b").read_text().strip() == other


def test_faster_precision_gives_a_word_that_the_engine_takes() -> None:
    assert faster_precision() in ("fp32", "bf16")


def test_a_stage_that_fails_or_makes_nothing_is_not_done(a_road: str, tmp_path: Path) -> None:
    Path(a_road).write_text(ROAD.format(out=tmp_path).replace("print(file", "raise SystemExit(3); print(file"))
    assert road([a_road, "precision=fp32"]) == 3
    Path(a_road).write_text(ROAD.format(out=tmp_path).replace(f'open(\\"{tmp_path}/a', f'open(\\"{tmp_path}/c'))
    assert road([a_road, "precision=fp32"]) == 1
    assert not (tmp_path / "b").exists()
