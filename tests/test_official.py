"""Official files in and out: the variants, prefixes, dtypes, shards, key names, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_released import (
    CONFIGS,
    SMALL,
    VARIANTS,
    model_command,
    model_of,
    random_state,
    refusal,
    same_bits,
    shapes,
    yamls,
)  # fmt: skip
from torch import Tensor

from model.action_dit import ActionDiT
from model.official import (
    WEIGHTS_NAME,
    check_variant,
    config_json,
    settings_of_json,
    settings_of_tensors,
)
from model.third_party import diffusers_names
from model.weights import LazyWeights, load_into, open_weights, save_weights
from model.world import load_world, newest_checkpoint, read_world_config


@pytest.fixture
def import_words(codec_folder: Path, tmp_path: Path) -> list[str]:
    """What follows the file: a small universal model, its game, a codec and where to."""
    return [*yamls("universal"), *SMALL, f"codec={codec_folder}", f"out={tmp_path / 'checkpoint'}"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_released_file_is_recognised_by_names_and_shapes_at_its_full_size(variant: str) -> None:
    _, _, numbers, tensors, dtype = VARIANTS[variant]
    config = model_of(variant)
    specs = {name: spec.to(dtype) for name, spec in shapes(config).items()}
    assert (sum(spec.numel() for spec in specs.values()), len(specs)) == (numbers, tensors)
    check_variant(config, specs, config_json(config, "official"), variant)


@pytest.mark.parametrize(
    ("given", "config", "said"),
    [
        ("gta_drive", "universal", "model.action.keyboard_dim_in=2 (config 4)"),
        ("universal", "foundation", "model.action.blocks=0-14 (config 0-29)"),
        ("templerun", "universal", "model.action.enable_mouse=False (config True), model.action.keyboard_dim_in=7"),
    ],
)
def test_a_file_of_another_variant_names_the_settings_that_differ(given: str, config: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        check_variant(model_of(config), shapes(model_of(given)), {}, "file")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_shapes_and_config_json_tell_the_same_settings() -> None:
    for variant in VARIANTS:
        config = model_of(variant)
        told, shown = settings_of_json(config_json(config, "official")), settings_of_tensors(shapes(config))
        both = told.keys() & shown.keys()
        assert len(both) >= 10 and all(told[name] == shown[name] for name in both)
        assert ("causal.window" in told) and told["causal.window"] == (config.causal.window if config.causal else None)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_import_and_export_give_back_every_byte(
    variant: str, dtype: torch.dtype, prefix: str, tmp_path: Path, codec_folder: Path
) -> None:
    given = random_state(model_of(variant, *SMALL), prefix, dtype)
    save_file(given, tmp_path / "official.safetensors")
    out = tmp_path / "checkpoint"
    words = [*yamls(variant), *SMALL, f"codec={codec_folder}", f"out={out}"]
    assert model_command("import", str(tmp_path / "official.safetensors"), *words) == 0
    assert newest_checkpoint(out) == out and (out / "ema.safetensors").samefile(out / "model.safetensors")
    assert read_world_config(out).game.name == VARIANTS[variant][1]
    assert model_command("export", str(out), "format=official", f"out={tmp_path / 'back'}") == 0
    assert same_bits(load_file(tmp_path / "back" / WEIGHTS_NAME), given)
    # The folder that was written is one that can be imported, its config.json included.
    assert model_command("import", str(tmp_path / "back"), *words[:-1], f"out={tmp_path / 'again'}") == 0


def test_the_names_of_the_fastvideo_port_lead_there_and_back(tmp_path: Path, import_words: list[str]) -> None:
    given = random_state(model_of("universal", *SMALL))
    save_file(given, tmp_path / "official.safetensors")
    assert model_command("import", str(tmp_path / "official.safetensors"), *import_words) == 0
    checkpoint, port = str(tmp_path / "checkpoint"), tmp_path / "port"
    assert model_command("export", checkpoint, "format=diffusers", f"out={port}") == 0
    exported = load_file(port / WEIGHTS_NAME)
    assert same_bits({name: exported[port] for name, port in diffusers_names("transformer", given).items()}, given)
    assert {
        "condition_embedder.time_embedder.linear_1.weight", "condition_embedder.time_proj.bias", "scale_shift_table",
        "condition_embedder.image_embedder.norm1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight",
        "condition_embedder.image_embedder.ff.net.2.weight", "condition_embedder.image_embedder.norm2.bias",
        "blocks.2.scale_shift_table", "blocks.2.attn1.to_q.weight", "blocks.2.attn1.to_out.0.bias",
        "blocks.2.attn1.norm_k.weight", "blocks.2.attn2.to_v.weight", "blocks.2.norm2.weight", "proj_out.weight",
        "blocks.2.ffn.net.0.proj.weight", "blocks.2.ffn.net.2.bias", "patch_embedding.weight",
        "blocks.1.action_model.mouse_mlp.3.weight",
    } <= exported.keys()  # fmt: skip
    assert json.loads((port / "config.json").read_text())["_class_name"] == "CausalMatrixGame2WanModel"
    again = [*import_words[:-1], f"out={tmp_path / 'again'}"]
    assert model_command("import", str(port), *again) == 0
    assert same_bits(load_file(tmp_path / "again" / "model.safetensors"), given)


def test_names_of_the_port_are_told_apart_for_every_tensor_of_the_released_models() -> None:
    for variant in VARIANTS:
        names = list(shapes(model_of(variant)))
        assert len(set(diffusers_names("transformer", names).values())) == len(names)


def test_prefix_and_dtype_of_an_export_can_be_chosen(tmp_path: Path, import_words: list[str]) -> None:
    given = random_state(model_of("universal", *SMALL))
    save_file(given, tmp_path / "official.safetensors")
    assert model_command("import", str(tmp_path / "official.safetensors"), *import_words) == 0
    words = ["format=official", "prefix=model.", "dtype=bf16", f"out={tmp_path / 'bf16'}"]
    assert model_command("export", str(tmp_path / "checkpoint"), *words) == 0
    expected = {f"model.{name}": tensor.bfloat16() for name, tensor in given.items()}
    assert same_bits(load_file(tmp_path / "bf16" / WEIGHTS_NAME), expected)


def write_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Two shards and their index, as Hugging Face writes them."""
    folder.mkdir()
    names = sorted(state)
    halves = {"part-00001-of-00002.safetensors": names[::2], "part-00002-of-00002.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: state[name] for name in half}, folder / file)
    index = folder / "part.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {n: file for file, half in halves.items() for n in half}})
    )
    return index


def test_shards_are_read_as_one_file(tmp_path: Path, import_words: list[str]) -> None:
    given = random_state(model_of("universal", *SMALL), "model.", torch.bfloat16)
    index = write_shards(tmp_path / "sharded", given)
    assert same_bits(dict(open_weights(index)), given)
    assert model_command("import", str(tmp_path / "sharded"), *import_words) == 0
    assert model_command("export", str(tmp_path / "checkpoint"), "format=official", f"out={tmp_path / 'back'}") == 0
    assert same_bits(load_file(tmp_path / "back" / WEIGHTS_NAME), given)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "sharded", {name: torch.ones(2) for name in "abcd"})
    told = json.loads(index.read_text())
    for change, said in (
        ({"e": "part-00001-of-00002.safetensors"}, r"index\.json .*: e"),
        ({"a": "part-00003-of-00002.safetensors"}, "part-00003"),
    ):
        index.write_text(json.dumps({"weight_map": told["weight_map"] | change}))
        with pytest.raises((ValueError, OSError), match=said):
            open_weights(index)


def test_a_checkpoint_of_an_official_file_is_one_to_sample_from(tmp_path: Path, import_words: list[str]) -> None:
    words = [*import_words, "model.vision=none"]
    given = random_state(model_of("universal", *SMALL, "model.vision=none"), "model.")
    save_file(given, tmp_path / "official.safetensors")
    assert model_command("import", str(tmp_path / "official.safetensors"), *words) == 0
    loaded = load_world(tmp_path / "checkpoint").dit.state_dict()
    assert all(torch.equal(tensor, given[f"model.{name}"]) for name, tensor in loaded.items())


def test_what_is_missing_unexpected_or_misshapen_is_said(
    tmp_path: Path, import_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = random_state(model_of("universal", *SMALL))
    given["surplus"] = given.pop("head.modulation")
    given["head.head.bias"] = torch.zeros(3)
    save_file(given, tmp_path / "official.safetensors")
    said = refusal(capsys, "import", str(tmp_path / "official.safetensors"), *import_words)
    for part in ("1 missing: head.modulation", "1 unexpected: surplus", "1 misshapen: head.head.bias (3,) for (64,)"):
        assert part in said
    assert not (tmp_path / "checkpoint").exists()


def test_a_config_json_beside_the_file_counts(
    tmp_path: Path, import_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_of("universal", *SMALL)
    save_file(random_state(config), tmp_path / "official.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, "official") | {"num_heads": 4}))
    said = refusal(capsys, "import", str(tmp_path / "official.safetensors"), *import_words)
    assert "model.num_heads=4 (config 2)" in said


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code of a weights file was run')",))


def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, import_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(path: Path) -> str:
        return refusal(capsys, "import", str(path), *import_words)

    (tmp_path / "empty").mkdir()
    assert "there are none" in said(tmp_path / "empty")
    assert "no weights" in said(tmp_path / "nowhere")
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file({"x": torch.zeros(2)}, tmp_path / "two" / f"{name}.safetensors")
    assert "a.safetensors, b.safetensors; name the file" in said(tmp_path / "two")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "two" / "a.safetensors").read_bytes()[:-3])
    assert "cut.safetensors is no complete safetensors file" in said(tmp_path / "cut.safetensors")
    (tmp_path / "nothing.safetensors").write_bytes(b"")
    assert "no complete safetensors file" in said(tmp_path / "nothing.safetensors")
    torch.save({"x": Bomb()}, tmp_path / "code.pth")
    assert "code.pth wants to run exec; it was not run" in said(tmp_path / "code.pth")
    assert not (tmp_path / "checkpoint").exists()


def test_a_pickle_of_tensors_alone_is_read(tmp_path: Path, import_words: list[str]) -> None:
    given = random_state(model_of("universal", *SMALL), "model.")
    torch.save(given, tmp_path / "official.pth")
    assert model_command("import", str(tmp_path / "official.pth"), *import_words) == 0
    back = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert same_bits({f"model.{name}": tensor for name, tensor in back.items()}, given)


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("codec=", "'codec' is required"),
        ("out=", "'out' is required"),
        (str(CONFIGS / "games"), "'game' is required"),
        (str(CONFIGS / "models"), "'model' is required"),
    ],
)
def test_an_import_says_what_it_was_not_told(
    left_out: str, said: str, tmp_path: Path, import_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        word for word in import_words if not word.startswith((left_out, "model." if "models" in left_out else "?"))
    ]
    assert said in refusal(capsys, "import", str(tmp_path), *words)


def test_an_import_takes_the_number_of_keys_from_the_game(tmp_path: Path, import_words: list[str]) -> None:
    save_file(random_state(model_of("gta_drive", *SMALL)), tmp_path / "official.safetensors")
    drive = [import_words[0], yamls("gta_drive")[1], *import_words[2:], "model.action.keyboard_dim_in=null"]
    assert model_command("import", str(tmp_path / "official.safetensors"), *drive) == 0
    assert read_world_config(tmp_path / "checkpoint").model.action == model_of("gta_drive", *SMALL).action


def test_a_game_with_other_keys_and_a_finished_checkpoint_are_refused(
    tmp_path: Path, import_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(random_state(model_of("universal", *SMALL)), tmp_path / "official.safetensors")
    drive = [import_words[0], yamls("gta_drive")[1], *import_words[2:]]
    said = refusal(capsys, "import", str(tmp_path / "official.safetensors"), *drive)
    assert "keyboard_dim_in=4" in said and "gta_drive" in said
    assert model_command("import", str(tmp_path / "official.safetensors"), *import_words) == 0
    assert "checkpoint already" in refusal(capsys, "import", str(tmp_path / "official.safetensors"), *import_words)


MEASURE = """
import sys, torch
from configs import load_config
from model.action_dit import ActionDiT
from model.config import ModelConfig
from model.weights import load_into, open_weights, save_weights
def resident_kb(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
def added_kb(work):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = resident_kb("VmRSS")
    work()
    return resident_kb("VmHWM") - before
with torch.device("meta"):
    dit = ActionDiT(load_config(ModelConfig, sys.argv[2:]).model)
stored = open_weights(sys.argv[1])
copied = added_kb(lambda: save_weights(stored, sys.argv[1] + ".copy"))
print(copied, added_kb(lambda: load_into(dit, stored)))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory is read from /proc")
def test_loading_and_copying_200_mb_take_little_more_memory_than_the_model(tmp_path: Path) -> None:
    words = [*SMALL, "model.dim=1024", "model.ffn_dim=4096", "model.num_heads=8", "model.num_layers=6"]
    specs = {name: spec.bfloat16() for name, spec in shapes(model_of("universal", *words)).items()}
    path, size_mb = tmp_path / "big.safetensors", sum(spec.nbytes for spec in specs.values()) / 2**20
    assert size_mb > 190
    save_weights(LazyWeights(specs, lambda name: torch.ones_like(specs[name], device="cpu")), path)
    command = [sys.executable, "-c", MEASURE, str(path), yamls("universal")[0], *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, check=True)
    copied_mb, loaded_mb = (int(kb) / 1024 for kb in done.stdout.split())
    assert copied_mb < 0.2 * size_mb  # a tensor at a time; the largest is 8 MB
    assert loaded_mb < 1.2 * size_mb
    assert (tmp_path / "big.safetensors.copy").read_bytes() == path.read_bytes()


def test_weights_that_are_read_lazily_fill_a_model_as_a_dict_does(tmp_path: Path) -> None:
    config = model_of("universal", *SMALL)
    given = random_state(config, "model.", torch.bfloat16)
    save_weights(given, tmp_path / "x.safetensors", {"step": "1"})
    assert same_bits(load_file(tmp_path / "x.safetensors"), given)
    stored = open_weights(tmp_path / "x.safetensors")
    assert stored.metadata["step"] == "1" and set(stored) == set(given)
    one, other = ActionDiT(config), ActionDiT(config)
    load_into(one, stored)
    load_into(other, given)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    with torch.device("meta"):
        empty = ActionDiT(config)
    load_into(empty, stored)
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16} and all(
        p.requires_grad for p in empty.parameters()
    )
