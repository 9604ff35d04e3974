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
)
from torch import Tensor

from configs import flat, to_dict
from model.action_dit import ActionDiT
from model.official import WEIGHTS_NAME, check_variant, config_json, settings_of_json
from model.third_party import diffusers_names
from model.weights import LazyWeights, load_into, open_weights, save_weights
from model.world import CODEC, COMPLETE, WORLD_FILE, load_world, newest_checkpoint, read_world_config


@pytest.fixture
def import_args(codec_folder: Path, tmp_path: Path) -> list[str]:
    """What follows the file: a small universal model, its game, a codec and where to."""
    return [*yamls("universal"), *SMALL, f"codec={codec_folder}", f"out={tmp_path / 'checkpoint'}"]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A file of random weights for that model."""
    path = tmp_path / "official.safetensors"
    save_file(random_state(model_of("universal", *SMALL)), path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_released_file_is_recognised_by_names_and_shapes_at_its_full_size(variant: str) -> None:
    _, _, numbers, tensors, dtype = VARIANTS[variant]
    config = model_of(variant)
    specs = {name: spec.to(dtype) for name, spec in shapes(config).items()}
    assert (sum(spec.numel() for spec in specs.values()), len(specs)) == (numbers, tensors)
    check_variant(config, specs, config_json(config, "official"), variant)
    assert len(set(diffusers_names("transformer", specs).values())) == len(specs)  # the port's names are distinct, too


@pytest.mark.parametrize(
    ("given", "config", "names"),
    [
        ("gta_drive", "universal", ["action.keyboard_dim_in=2 (config 4)", "keyboard_embed.0.weight (128, 2)"]),
        ("universal", "foundation", ["model.action.blocks=", "missing: blocks.15.action_model."]),
        ("templerun", "universal", ["enable_mouse=False", "keyboard_dim_in=7", "missing: blocks.0.action_model.t_qkv"]),
    ],
)
def test_a_file_of_another_variant_names_what_differs(given: str, config: str, names: list[str]) -> None:
    other = model_of(given)
    with pytest.raises(ValueError) as error:
        check_variant(model_of(config), shapes(other), config_json(other, "official"), "file")
    assert all(name in str(error.value) for name in names[:-1]) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="file is of another variant") as error:
        check_variant(model_of(config), shapes(other), {}, "file")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_json_says_the_settings_that_it_is_made_of(variant: str) -> None:
    config = model_of(variant)
    ours, written = flat(to_dict(config)), settings_of_json(config_json(config, "official"))
    assert len(ours.keys() & written.keys()) >= 18
    assert {name: ours[name] for name in written.keys() & ours.keys()}.items() <= written.items()


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_import_and_export_give_back_every_byte(
    variant: str, dtype: torch.dtype, prefix: str, tmp_path: Path, codec_folder: Path
) -> None:
    given = random_state(model_of(variant, *SMALL), prefix, dtype)
    save_file(given, tmp_path / "official.safetensors")
    out = tmp_path / "checkpoint"
    args = [*yamls(variant), *SMALL, f"codec={codec_folder}", f"out={out}"]
    assert model_command("import", str(tmp_path / "official.safetensors"), *args) == 0
    assert newest_checkpoint(out) == out and (out / "ema.safetensors").samefile(out / "model.safetensors")
    assert read_world_config(out).game.name == VARIANTS[variant][1]
    assert model_command("export", str(out), "format=official", f"out={tmp_path / 'back'}") == 0
    assert same_bits(load_file(tmp_path / "back" / WEIGHTS_NAME), given)
    # The folder that was written is one that can be imported, its config.json included.
    assert model_command("import", str(tmp_path / "back"), *args[:-1], f"out={tmp_path / 'again'}") == 0


def test_the_names_of_the_fastvideo_port_lead_there_and_back(
    tmp_path: Path, official: Path, import_args: list[str]
) -> None:
    given = load_file(official)
    assert model_command("import", str(official), *import_args) == 0
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
    assert model_command("import", str(port), *import_args[:-1], f"out={tmp_path / 'again'}") == 0
    assert same_bits(load_file(tmp_path / "again" / "model.safetensors"), given)


def test_prefix_and_dtype_of_an_export_can_be_chosen(tmp_path: Path, official: Path, import_args: list[str]) -> None:
    assert model_command("import", str(official), *import_args) == 0
    args = ["format=official", "prefix=model.", "dtype=bf16", f"out={tmp_path / 'bf16'}"]
    assert model_command("export", str(tmp_path / "checkpoint"), *args) == 0
    expected = {f"model.{name}": tensor.bfloat16() for name, tensor in load_file(official).items()}
    assert same_bits(load_file(tmp_path / "bf16" / WEIGHTS_NAME), expected)


def write_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Two shards and their index, as Hugging Face writes them."""
    folder.mkdir()
    files = {name: f"part-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    index = folder / "part.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_shards_are_read_as_one_file(tmp_path: Path, import_args: list[str]) -> None:
    given = random_state(model_of("universal", *SMALL), "model.", torch.bfloat16)
    assert same_bits(dict(open_weights(write_shards(tmp_path / "sharded", given))), given)
    assert model_command("import", str(tmp_path / "sharded"), *import_args) == 0
    assert model_command("export", str(tmp_path / "checkpoint"), "format=official", f"out={tmp_path / 'back'}") == 0
    assert same_bits(load_file(tmp_path / "back" / WEIGHTS_NAME), given)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"e": "part-00001-of-00002.safetensors"}, r"index\.json .*: e"),
        ({"a": "part-00003-of-00002.safetensors"}, "part-00003"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path, change: dict[str, str], named: str) -> None:
    index = write_shards(tmp_path / "sharded", {name: torch.ones(2) for name in "abcd"})
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"] | change}))
    with pytest.raises((ValueError, OSError), match=named):
        open_weights(index)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_of_an_official_file_is_one_to_sample_from(
    tmp_path: Path, import_args: list[str], suffix: str
) -> None:
    given, path = random_state(model_of("universal", *SMALL, "model.vision=none"), "model."), tmp_path / f"x.{suffix}"
    save_file(given, path) if suffix == "safetensors" else torch.save(given, path)
    assert model_command("import", str(path), *import_args, "model.vision=none") == 0
    loaded = load_world(tmp_path / "checkpoint").dit.state_dict()
    assert same_bits({f"model.{name}": tensor for name, tensor in loaded.items()}, given)


def test_what_is_missing_unexpected_or_misshapen_is_named(
    tmp_path: Path, official: Path, import_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = load_file(official)
    given["surplus"] = given.pop("head.modulation")
    given["head.head.bias"] = torch.zeros(3)
    save_file(given, official)
    error = refusal(capsys, "import", str(official), *import_args)
    for part in ("1 missing: head.modulation", "1 unexpected: surplus", "1 misshapen: head.head.bias (3,) for (64,)"):
        assert part in error
    assert not (tmp_path / "checkpoint").exists()


def test_a_config_json_beside_the_file_counts(
    tmp_path: Path, official: Path, import_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    written = config_json(model_of("universal", *SMALL), "official") | {"num_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert "model.num_heads=4 (config 2)" in refusal(capsys, "import", str(official), *import_args)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, official: Path, import_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("empty", "two"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        save_file({"x": torch.zeros(2)}, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(official.read_bytes()[:-3])
    (tmp_path / "nothing.safetensors").write_bytes(b"")
    for file, part in (
        ("empty", "none"),
        ("nowhere", "no weights"),
        ("two", "a.safetensors, b.safetensors; name the file"),
        ("cut.safetensors", "cut.safetensors is no complete safetensors file"),
        ("nothing.safetensors", "no complete safetensors file"),
    ):
        assert part in refusal(capsys, "import", str(tmp_path / file), *import_args)
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("setting", ["codec", "out", "game", "model"])
def test_an_import_names_the_setting_that_it_needs(
    setting: str, tmp_path: Path, import_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    starts = {"game": (str(CONFIGS / "games"),), "model": (str(CONFIGS / "models"), "model.")}
    args = [arg for arg in import_args if not arg.startswith(starts.get(setting, (f"{setting}=",)))]
    assert f"'{setting}' is required" in refusal(capsys, "import", str(tmp_path), *args)


def test_an_import_takes_the_number_of_keys_from_the_game(tmp_path: Path, import_args: list[str]) -> None:
    save_file(random_state(model_of("gta_drive", *SMALL)), tmp_path / "official.safetensors")
    drive = [import_args[0], yamls("gta_drive")[1], *import_args[2:], "model.action.keyboard_dim_in=null"]
    assert model_command("import", str(tmp_path / "official.safetensors"), *drive) == 0
    assert read_world_config(tmp_path / "checkpoint").model.action == model_of("gta_drive", *SMALL).action


def test_a_game_with_other_keys_and_a_finished_checkpoint_are_refused(
    official: Path, import_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    drive = [import_args[0], yamls("gta_drive")[1], *import_args[2:]]
    error = refusal(capsys, "import", str(official), *drive)
    assert "keyboard_dim_in=4" in error and "gta_drive" in error
    assert model_command("import", str(official), *import_args) == 0
    assert "checkpoint already" in refusal(capsys, "import", str(official), *import_args)


MEASURE = """
import sys, torch
from configs import load_config
from model.action_dit import ActionDiT
from model.config import ModelConfig
from model.weights import load_into, open_weights, save_weights
def resident_kb(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
def added_kb(work):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins again
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
    args = [*SMALL, "model.dim=1024", "model.ffn_dim=4096", "model.num_heads=8", "model.num_layers=6"]
    specs = {name: spec.bfloat16() for name, spec in shapes(model_of("universal", *args)).items()}
    path, size_mb = tmp_path / "big.safetensors", sum(spec.nbytes for spec in specs.values()) / 2**20
    assert size_mb > 190
    save_weights(LazyWeights(specs, lambda name: torch.ones_like(specs[name], device="cpu")), path)
    command = [sys.executable, "-c", MEASURE, str(path), yamls("universal")[0], *args]
    # A fixed threshold: what is freed goes back to the system at once, so that only what is held is measured.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, env=environment, check=True)
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
    lazy, whole = ActionDiT(config), ActionDiT(config)
    load_into(lazy, stored)
    load_into(whole, given)
    assert same_bits(lazy.state_dict(), whole.state_dict())
    with torch.device("meta"):
        empty = ActionDiT(config)
    load_into(empty, stored)
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in empty.parameters())


@pytest.mark.parametrize(
    "part",
    ["borders=4", "rope_theta=[100,100,100]", "action.time_path=true", "action.place_path=true", "causal.unknown=last"],
)
def test_an_export_refuses_by_name_what_no_other_program_has(
    part: str, tmp_path: Path, import_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("universal", *SMALL, f"model.{part}")
    save_file(random_state(model), tmp_path / "ours.safetensors")
    assert model_command("import", str(tmp_path / "ours.safetensors"), *import_args, f"model.{part}") == 0
    for layout in ("official", "diffusers"):
        error = refusal(capsys, "export", str(tmp_path / "checkpoint"), f"format={layout}", f"out={tmp_path / 'out'}")
        assert part.split("=")[0] in error
    assert not (tmp_path / "out").exists()


def test_a_world_to_hand_on_has_one_set_of_weights_and_its_codec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], import_args: list[str]
) -> None:
    part = "model.action.place_path=true"
    save_file(weights := random_state(model_of("universal", *SMALL, part)), tmp_path / "ours.safetensors")
    assert model_command("import", str(tmp_path / "ours.safetensors"), *import_args, part) == 0
    args = ["format=worldloom", "dtype=bf16", f"out={tmp_path / 'world'}"]
    assert "prefix=none" in refusal(capsys, "export", str(tmp_path / "checkpoint"), *args, "prefix=none")
    assert model_command("export", str(tmp_path / "checkpoint"), *args) == 0
    assert {path.name for path in (tmp_path / "world").iterdir()} == {COMPLETE, WORLD_FILE, CODEC, "ema.safetensors"}
    given = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert same_bits(load_file(tmp_path / "world" / "ema.safetensors"), given)
