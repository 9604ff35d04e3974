"""A road: stages that are done are reused, and all of them compute in one precision."""

import re
from pathlib import Path

import pytest

from configs.files import sole_writer
from launch.precision import faster_precision, precision_of_road
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": 1}', "[" * 200_000, "\xff"])
def test_a_damaged_stamp_is_one_line(a_road: str, tmp_path: Path, text: str) -> None:
    (tmp_path / STAMPS).mkdir()
    (tmp_path / STAMPS / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json") as raised:
        road([a_road, "precision=fp32"])
    assert len(str(raised.value).splitlines()) == 1 and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("{name: ../x, command: date, makes: x}", "'../x'"),
        ("{name: x, command: '', makes: x}", "stage x: its command cannot be read"),
        ('{name: x, command: "date \'", makes: x}', "No closing quotation"),
        ("{name: x, command: date, makes: x}, {name: x, command: date, makes: y}", "two stages are called x"),
    ],
)
def test_a_road_that_cannot_be_gone_is_refused_before_its_first_stage(tmp_path: Path, stages: str, said: str) -> None:
    (tmp_path / "road.yaml").write_text(f"out: {tmp_path}\nopens: x\nprecision: fp32\nstages: [{stages}]\n")
    with pytest.raises(ValueError, match=re.escape(said)):
        road([str(tmp_path / "road.yaml")])


def test_a_precision_that_is_none_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "precision").write_text("fp16")
    with pytest.raises(ValueError, match="holds neither fp32 nor bf16"):
        precision_of_road(tmp_path)


@pytest.mark.parametrize("name", ["a b", "it's", 'a"b', "a;touch PWNED", "`touch PWNED`", "$HOME", "007", "#c", "a\\b"])
def test_a_road_leads_into_a_folder_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = "{name: a, command: 'touch ${out}/a', makes: '${out}/a'}"
    (tmp_path / "road.yaml").write_text(f"out: x\nopens: x\nprecision: fp32\nstages: [{stage}]\n")
    monkeypatch.chdir(tmp_path)
    assert road(["road.yaml", f"out={name}"]) == 0
    assert (tmp_path / name / "a").exists() and {path.name for path in tmp_path.iterdir()} == {"road.yaml", name}


def test_two_roads_do_not_go_through_one_folder(a_road: str, tmp_path: Path) -> None:
    """The second one would set aside what a stage of the first one is writing."""
    with sole_writer(tmp_path / STAMPS, "road"), pytest.raises(ValueError, match="is in use by the road of process"):
        road([a_road, "precision=fp32"])
    assert not (tmp_path / "a").exists() and road([a_road, "precision=fp32"]) == 0


def test_a_road_does_not_lead_into_a_bucket(a_road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not in a bucket"):
        road([a_road, "out=s3://bucket/road"])
    assert [path.name for path in tmp_path.iterdir()] == ["road.yaml"]
