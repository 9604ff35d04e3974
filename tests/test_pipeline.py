"""A pipeline: stages that are done are reused, and all of them compute in one precision."""

import re
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.lease import sole_writer
from launch.pipeline import STAMPS, pipeline

PIPELINE = """
out: {out}
opens: {out}/b
precision: auto
stages:
  - {{name: a, command: 'python -c "print(file=open(\\"{out}/a\\", \\"a\\"))"', output: '{out}/a'}}
  - name: b
    command: 'python -c "print(\\"${{precision}}\\", file=open(\\"{out}/b\\", \\"a\\"))"'
    output: '{out}/b'
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> str:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.format(out=tmp_path))
    return str(path)


def write_pipeline(folder: Path, stages: str, out: object = None) -> str:
    path = folder / "pipeline.yaml"
    path.write_text(f"out: {out or folder}\nopens: x\nprecision: fp32\nstages: [{stages}]\n")
    return str(path)


def test_done_stages_are_reused_until_one_before_them_changes(yaml_file: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert pipeline([yaml_file, "precision=fp32"]) == 0
    assert (tmp_path / "a").read_text() == "\n"
    assert (tmp_path / "b").read_text() == "fp32\n"
    (tmp_path / "a").unlink()
    assert pipeline([yaml_file, "precision=fp32"]) == 0
    assert (tmp_path / "b").read_text() == (tmp_path / "b.1").read_text() == "fp32\n"


def test_a_changed_yaml_file_sets_aside_what_was_made_with_it(tmp_path: Path) -> None:
    settings, out = tmp_path / "settings.yaml", tmp_path / "made"
    settings.write_text("steps: 1")
    command = f'sh -c "cat {settings} >> {out}" {settings}'
    path = write_pipeline(tmp_path, f"{{name: a, command: '{command}', output: {out}}}")
    for _ in range(2):
        assert pipeline([path]) == 0
    assert out.read_text() == "steps: 1"
    settings.write_text("steps: 2")
    assert pipeline([path]) == 0
    assert out.read_text() == "steps: 2" and (tmp_path / "made.1").read_text() == "steps: 1"


def test_a_stage_that_was_stopped_goes_on_with_what_it_has(tmp_path: Path) -> None:
    out, go = tmp_path / "made", tmp_path / "go"
    command = f'sh -c "echo part >> {out}; test -e {go}"'
    path = write_pipeline(tmp_path, f"{{name: a, command: '{command}', output: {out}}}")
    assert pipeline([path]) == 1
    go.touch()
    assert pipeline([path]) == 0
    assert out.read_text() == "part\npart\n" and not (tmp_path / "made.1").exists()


def test_the_precision_is_measured_once_and_kept(yaml_file: str, tmp_path: Path) -> None:
    stored = tmp_path / STAMPS / "precision"
    assert pipeline([yaml_file]) == 0
    measured = stored.read_text().strip()
    assert (tmp_path / "b").read_text().strip() == measured in ("fp32", "bf16")
    other = {"fp32": "bf16", "bf16": "fp32"}[measured]
    stored.write_text(other)
    assert pipeline([yaml_file]) == 0
    assert (tmp_path / "b").read_text().strip() == other
    stored.write_text("fp16")
    with pytest.raises(UserError, match="precision"):
        pipeline([yaml_file])


def test_a_stage_that_fails_or_makes_nothing_is_not_done(yaml_file: str, tmp_path: Path) -> None:
    Path(yaml_file).write_text(PIPELINE.format(out=tmp_path).replace("print(file", "raise SystemExit(3); print(file"))
    assert pipeline([yaml_file, "precision=fp32"]) == 3
    Path(yaml_file).write_text(PIPELINE.format(out=tmp_path).replace(f'open(\\"{tmp_path}/a', f'open(\\"{tmp_path}/c'))
    assert pipeline([yaml_file, "precision=fp32"]) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"command": 1}', "[" * 200_000, "\xff"])
def test_a_damaged_stamp_is_one_line(yaml_file: str, tmp_path: Path, text: str) -> None:
    (tmp_path / STAMPS).mkdir()
    (tmp_path / STAMPS / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"a\.json") as raised:
        pipeline([yaml_file, "precision=fp32"])
    assert len(str(raised.value).splitlines()) == 1 and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("stages", "error"),
    [
        ('{name: x, command: "date \'", output: x}', "No closing quotation"),
        ("{name: x, command: date, output: x}, {name: x, command: date, output: y}", "two stages are called x"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_before_its_first_stage(tmp_path: Path, stages: str, error: str) -> None:
    with pytest.raises(UserError, match=re.escape(error)):
        pipeline([write_pipeline(tmp_path, stages)])


@pytest.mark.parametrize("name", ["a b", "it's", 'a"b', "a;touch PWNED", "`touch PWNED`", "$HOME", "007", "#c", "a\\b"])
def test_a_pipeline_writes_into_a_folder_of_any_name(name: str, tmp_path: Path, monkeypatch) -> None:
    write_pipeline(tmp_path, "{name: a, command: 'touch ${out}/a', output: '${out}/a'}", out="x")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time the output is found
        assert pipeline(["pipeline.yaml", f"out={name}"]) == 0
    assert (tmp_path / name / "a").exists() and {path.name for path in tmp_path.iterdir()} == {"pipeline.yaml", name}


def test_two_pipelines_do_not_share_one_folder(yaml_file: str, tmp_path: Path) -> None:
    """The second one would set aside what a stage of the first one is writing."""
    in_use = pytest.raises(UserError, match="in use by the pipeline of")
    with sole_writer(tmp_path / STAMPS, "pipeline"), in_use:
        pipeline([yaml_file, "precision=fp32"])
    assert not (tmp_path / "a").exists() and pipeline([yaml_file, "precision=fp32"]) == 0


def test_a_pipeline_does_not_write_into_a_bucket(yaml_file: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="out=s3://"):
        pipeline([yaml_file, "out=s3://bucket/folder"])
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]
