"""The one config loader and the command line: later arguments win, a wrong one is one clear line, a type says what a
text means, and nothing in an untrusted file is resolved."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from configs import load_config, load_file, save_config
from configs.cli import Verb, call, run
from configs.errors import UserError, one_line
from configs.overrides import read_settings
from configs.untrusted import inside, parse_object


@dataclass(frozen=True)
class Sizes:
    height: int = 1
    rate: float = 1.0


@dataclass(frozen=True)
class Settings:
    out: str = "here"
    init: str | None = None
    compile: Literal["no", "default"] = "default"
    keys: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    sizes: Sizes = Sizes()
    dry_run: bool = False


@dataclass(frozen=True)
class Required:
    steps: int


@pytest.mark.parametrize("program", ["data_pipeline", "model", "sampling", "train", "launch"])
def test_every_program_refuses_an_unknown_verb_in_one_line(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", program, "dance"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "dance" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_whose_streams_are_closed_does_its_work(closed: str, tmp_path: Path) -> None:
    """And no file of its own gets the number of one, into which libraries would then write."""
    code = """
import sys
from tqdm import tqdm
from configs.cli import Verb, run
def work(args):
    with open(args[0], "w") as file:
        tqdm.write("text", file=sys.stderr)
        print("text", file=sys.stdout)
        file.write(str(file.fileno() > 2))
sys.exit(run("x", {"work": Verb(work)}, ["work", sys.argv[1]]))
"""
    done = subprocess.run(["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", code, str(tmp_path / "made")])
    assert done.returncode == 0 and (tmp_path / "made").read_text() == "True"


TEXTS = [
    "007", "1e5", "run #2", "off", "a: b", "[set1]", "{a", "null", "true", "2026-01-01", "0x10", "'a'", '"b"', " x",
    "- y", "s3://b/k", "*", "&a", "!x", "%", "@", "1:30", "1_000", "~x", "x~", "=", "a=b", "|", ">", "?",
    "\\n", "é", "C:\\x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_stands_and_read_back_as_it_was_saved(text: str, tmp_path: Path) -> None:
    assert load_config(Settings, [f"out={text}"]).out == text
    assert load_config(Settings, [f"env.A={text}"]).env == {"A": text}
    assert load_config(Settings, [f"init={text}"]).init == (None if text == "null" else text)
    saved = Settings(out=text, keys=(text,), env={text: text})
    save_config(saved, tmp_path / "c.yaml")
    assert load_config(Settings, [str(tmp_path / "c.yaml")]) == saved == load_file(Settings, tmp_path / "c.yaml")


def test_texts_in_lists_and_files_are_no_switches_or_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("out: 007\nkeys: [y, n, on, 1, 1e5]\ncompile: no\nenv: {OMP: 08, y: no}\n")
    config = load_config(Settings, [str(tmp_path / "a.yaml")])
    assert (config.out, config.compile, config.env) == ("007", "no", {"OMP": "08", "y": "no"})
    assert config.keys == ("y", "n", "on", "1", "1e5")
    assert load_config(Settings, ["keys=[y, n, 007]", "compile=no"]) == Settings(keys=("y", "n", "007"), compile="no")


def test_other_settings_read_numbers_switches_lists_and_nothing_from_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("sizes: {height: 4, rate: 1e-4}\ninit: null\ndry_run: yes\n")
    args = [str(tmp_path / "a.yaml"), "sizes={height: 7}", "init=null", "dry_run=false"]
    assert load_config(Settings, args) == Settings(sizes=Sizes(7, 1e-4))
    assert load_config(Settings, ["sizes={height: 7}", "sizes.rate=2"]).sizes == Sizes(7, 2.0)


def test_a_home_folder_is_found_where_no_shell_expands_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "a.yaml").write_text("init: ~/b\nkeys: [~/k, '~']\n")
    config = load_config(Settings, [str(tmp_path / "a.yaml"), "out=~/x"])
    assert (config.out, config.init, config.keys) == ("/home/me/x", "/home/me/b", ("/home/me/k", "~"))
    assert load_file(Settings, tmp_path / "a.yaml").init == "~/b"  # a foreign file does not know whose home it is
    received: list[list[str]] = []
    run("program", {"verb": Verb(lambda args: received.append(args))}, ["verb", "~/a.yaml", "~x", "out=~/b"])
    assert received == [["/home/me/a.yaml", "~x", "out=~/b"]]


@pytest.mark.parametrize("arg", [
    "out=", "sizes.rate=nan", "sizes.rate=inf", "sizes.rate=1e999", "sizes.height=1e1", f"sizes.height={2**63}",
    "sizes.height=7.5", "sizes.height=one", "sizes.height=true", "sizes=3", "dry_run=2", "=x", "sizes..rate=1",
    "sizes={height: 7", "keys=[a", "compile=never", "out=${", "out=${gone}", "stray",
])  # fmt: skip
def test_a_wrong_argument_is_one_line_with_its_name(arg: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Settings, [arg])
    assert "\n" not in str(caught.value) and arg.strip("=").split("=")[0].split("..")[0] in str(caught.value)


def test_a_mistyped_and_a_missing_setting_and_a_missing_file_are_named() -> None:
    with pytest.raises(UserError, match=r"'sizes\.rate'"):
        load_config(Settings, ["sizes.ratee=2"])
    with pytest.raises(UserError, match="'steps' is required"):
        load_config(Required, [])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(Settings, ["nowhere.yaml"])


FILES = {
    "half an interpolation": "out: ${", "no mapping": "- a", "half a list": "out: [", "a key twice": "out: a\nout: b",
    "too deep": "out: " + "[" * 100_000, "a program": "out: !!python/object/apply:os.system [id]",
    "a key list": "[a]: b", "an alias": "keys: &a [*a]", "control characters": "out: \x01",
}  # fmt: skip


@pytest.mark.parametrize("text", FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("read", [load_config, load_file], ids=["the user's", "a program's"])
def test_a_file_of_settings_that_is_wrong_is_one_line_with_its_name(text: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        read(Settings, [str(path)] if read is load_config else path)


def test_a_program_s_file_cannot_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SEKRIT")
    for text in ("out: s3://b/${oc.env:AWS_SECRET_ACCESS_KEY}", "env: {'${oc.env:HOME}': a}", "keys: [a, '\\${x}']"):
        (tmp_path / "world.yaml").write_text(text)
        with pytest.raises(UserError, match=r"world\.yaml refers to") as caught:
            load_file(Settings, tmp_path / "world.yaml")
        assert "SEKRIT" not in str(caught.value)


def test_a_file_of_settings_is_read_or_refused_soon(tmp_path: Path) -> None:
    """Comparing every key with every other took minutes."""
    (tmp_path / "world.yaml").write_text("\n".join(f"k{i}: x" for i in range(40_000)))
    assert len(read_settings(tmp_path / "world.yaml")) == 40_000
    (tmp_path / "world.yaml").write_text("a: [" + "x," * 300_000 + "]")
    with pytest.raises(ValueError, match="that is no file of settings"):
        read_settings(tmp_path / "world.yaml")


def test_an_error_that_quotes_a_file_is_cut() -> None:
    line = one_line(ValueError("a" * 1500 + "\n" + "b" * 10**6))
    assert len(line) < 2100 and line.startswith("aaa") and line.endswith("bbb") and " ... " in line


def test_a_first_argument_that_is_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    received: list[list[str]] = []
    (tmp_path / "lr=3").mkdir()
    verb = Verb(lambda args: received.append(args), first="checkpoint")
    call(verb, [str(tmp_path / "lr=3"), "seed=1"])
    call(verb, ["seed=1"])
    assert received == [[f"checkpoint={tmp_path / 'lr=3'}", "seed=1"], ["seed=1"]]


NAMES = ["..", "../a", "a/../b", "/etc/x", "", "a//b", ".", "a/.", "a\\b", "a\0b", "a\nb", "link/x", "a/", "\x7f"]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_foreign_file_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="names"):
        inside(tmp_path / "in", name)
    assert inside(tmp_path / "in", "a/b..c") == tmp_path / "in" / "a" / "b..c"


JSON = ["", "[]", "1", "{", "[" * 200_000, '{"a": NaN}', '{"a": 1e999}', '{"a": -Infinity}', "\xff"]


@pytest.mark.parametrize("text", JSON)
def test_damaged_json_is_one_line_with_its_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^index\.json "):
        parse_object(text, "index.json")
    with pytest.raises(ValueError, match=r"^index\.json "):
        parse_object(text.encode("latin-1") or b"\xff", "index.json")
