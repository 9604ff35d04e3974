"""Weights as others leave them: wrapped names, sets within sets, damaged and hostile files, numbers that are none."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_released import SMALL, model_of, random_state, refusal, same_bits, yamls
from tiny_world import random_dit, write_checkpoint, write_codec
from torch import Tensor

from model.bare_names import bare_names
from model.codec import load_codec
from model.patch_codec import WEIGHTS_FILE
from model.third_party import load_third_party
from model.weights import load_into, load_weights, open_weights, save_weights
from model.world import load_world

PLAIN = {"blocks.0.ffn.0.weight": torch.ones(2), "head.head.bias": torch.zeros(3)}
OTHER = {name: tensor + 1 for name, tensor in PLAIN.items()}
PREFIXES = [
    "module.", "_orig_mod.", "_fsdp_wrapped_module.", "diffusion_model.", "model.diffusion_model.", "generator.model.",
    "transformer.",
    "module.model._orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module.", "model.module.model.",
]  # fmt: skip


def under(prefix: str, state: dict[str, Tensor] = PLAIN) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_wraps_all_names_is_taken_off_and_noted(
    tmp_path: Path, prefix: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pt":
        saved(under(prefix), path)
    else:
        save_weights(under(prefix), path)
    assert same_bits(dict(load_third_party(path)), PLAIN)
    note = capsys.readouterr().err.strip()
    assert str(path) in note and "\n" not in note and all(part in note for part in prefix.split("."))


def test_what_wraps_parts_of_a_model_is_taken_out_of_the_middle_of_names() -> None:
    names = [
        "_fsdp_wrapped_module.blocks.0._orig_mod.ffn.0.weight", "blocks.1._fsdp_wrapped_module.ffn.0.weight",
        "blocks.2._checkpoint_wrapped_module.module.ffn.0.weight",
    ]  # fmt: skip
    bare, _ = bare_names({name: torch.ones(1) for name in names}, "x.pt")
    assert list(bare.values()) == [f"blocks.{i}.ffn.0.weight" for i in range(3)]


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        ({"generator_ema": PLAIN, "generator": OTHER, "critic": OTHER, "step": 3}, "generator_ema/"),
        ({"generator_ema": under("model._fsdp_wrapped_module."), "generator": OTHER}, "generator_ema/model."),
        ({"generator": under("model."), "critic": OTHER, "critic_ema": OTHER}, "generator/model."),
        ({"model": PLAIN, "step": torch.tensor(3), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "model/"),
        ({"ema": {"module": PLAIN}, "model": OTHER}, "ema/"),
        ({"ema_1000": OTHER, "ema_2000": PLAIN, "model": OTHER}, "ema_2000/"),
        ({"ema_0.999": OTHER, "ema_0.9999": PLAIN}, "ema_0.9999/"),
        ({"state_dict": {"n_averaged": torch.tensor(7), **under("module.")}, "epoch": 1}, "state_dict/"),
        ({**under("ema_model."), **under("online_model.", OTHER), "initted": torch.tensor(True)}, "ema_model."),
        ({"state": {"model": {"state_dict": PLAIN}}}, "state/model/state_dict/"),
    ],
)
def test_of_several_sets_the_newest_average_is_taken_else_the_model(
    tmp_path: Path, content: dict[str, Any], taken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert same_bits(dict(load_third_party(saved(content, tmp_path / "x.pt"))), PLAIN)
    assert f"the weights under {taken} are taken" in capsys.readouterr().err


def test_names_of_the_model_itself_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert same_bits(dict(load_third_party(saved(PLAIN, tmp_path / "x.pt"))), PLAIN)
    clip = under("transformer.") | {"cls_embedding": torch.ones(1), "head": torch.ones(2)}
    assert same_bits(dict(load_third_party(saved(clip, tmp_path / "clip.pt"))), clip)
    assert capsys.readouterr().err == ""


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="would be called"):
        load_into(random_dit(), PLAIN | under("module.", OTHER))


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DEEP = b'{"x": ' + b"[" * 200_000


@pytest.mark.parametrize(
    "header",
    [
        *({"x": GOOD | {"shape": shape}} for shape in ([-2], [1 << 70], [1 << 40, 1 << 40], ["2"], [2.0], "2", None)),
        *({"x": GOOD | {"shape": shape, "data_offsets": [0, 0]}} for shape in ([0, 1 << 61], [0] + [1 << 40] * 3)),
        *({"x": GOOD | {"shape": shape}} for shape in ([True, 2], [[2]], [1] * 99 + [2], {"0": 2})),
        *({"x": GOOD | {"dtype": dtype}} for dtype in (["F32"], None, "F4", 32, {})),
        *({"x": GOOD | {"data_offsets": at}} for at in ([0.0, 8.0], [-8, 0], [0, 4, 8], [8, 0], "08", [0], None)),
        *({"x": {key: value for key, value in GOOD.items() if key != left}} for left in GOOD),
        {"x": GOOD, "y": GOOD}, {"x": GOOD | {"data_offsets": [4, 12]}}, {"x": GOOD, "__metadata__": {"a": {}}},
        {"x": GOOD, "__metadata__": []}, {"x": [GOOD]}, {"x": 8}, [GOOD], "x", 8, None, b"\xff\xfe", b"{", DEEP,
        b'{"x": 1e999}', b"",
    ],
    ids=lambda header: repr(header)[:60],
)  # fmt: skip
def test_a_damaged_header_is_one_line_that_names_the_file(tmp_path: Path, header: Any) -> None:
    path, text = tmp_path / "x.safetensors", header if isinstance(header, bytes) else json.dumps(header).encode()
    for length in (len(text), 1 << 63):
        path.write_bytes(length.to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(ValueError, match=r"x\.safetensors") as error:
            open_weights(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "index",
    [
        b"{" * 100_000, b"[]", b'{"weight_map": []}', b'{"weight_map": {"x": 3}}', b'{"weight_map": {"x": "../y"}}',
        b"", b'{"weight_map": {"x": "/etc/passwd"}}',
        b'{"weight_map": {"x": "a\\u0000b"}}', b'{"weight_map": {"x": ".."}}',
    ],
)  # fmt: skip
def test_a_damaged_index_is_one_line_and_leads_nowhere(tmp_path: Path, index: bytes) -> None:
    save_weights({"x": torch.ones(1)}, tmp_path.parent / "y")
    (tmp_path / "x.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"x\.safetensors\.index\.json"):
        open_weights(tmp_path / "x.safetensors.index.json")


class Malice:
    """Unpickled, it would stop the tests."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code of a weights file was run')",))


@pytest.mark.parametrize(
    "garbage", [b"\x80\x02\x8a\xffgarbage", b"\x80\x02G\x00", b"\x80\x02X\xff\xff\xff\x7f", b"I\n."]
)
def test_garbage_inside_a_torch_file_is_one_line(tmp_path: Path, garbage: bytes) -> None:
    whole = saved(PLAIN, tmp_path / "whole.pth")
    with zipfile.ZipFile(whole) as given, zipfile.ZipFile(tmp_path / "x.pth", "w") as spoilt:
        for name in given.namelist():
            spoilt.writestr(name, garbage if name.endswith("data.pkl") else given.read(name))
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_third_party(tmp_path / "x.pth")


@pytest.mark.parametrize("damage", ["code", "code in a pickle", "cut off", "text", "empty"])
def test_a_file_that_is_no_torch_file_is_one_line_and_is_not_run(tmp_path: Path, damage: str) -> None:
    path = saved(PLAIN if damage == "cut off" else {"x": Malice()}, tmp_path / "x.pth")
    contents = {"code in a pickle": pickle.dumps(Malice()), "text": b"no weights at all", "empty": b""}
    path.write_bytes(contents.get(damage, path.read_bytes()[: -100 if damage == "cut off" else None]))
    with pytest.raises(ValueError, match=r"x\.pth") as error:
        load_third_party(path)
    assert "\n" not in str(error.value)


def test_mappings_that_hold_each_other_twice_are_not_unfolded(tmp_path: Path) -> None:
    nested: dict[str, Any] = dict(PLAIN)
    for _ in range(40):
        nested = {"a": nested, "b": nested}
    nested["a"]["itself"] = nested
    path = saved({"ema": PLAIN, "model": PLAIN, "of the optimizer": nested}, tmp_path / "x.pt")
    assert same_bits(dict(load_third_party(path)), PLAIN)


@pytest.mark.parametrize(
    "content",
    [
        [], {}, {"step": 3}, 7, PLAIN["head.head.bias"], {"x": torch.ones(2).to_sparse()},
        {"x": torch.ones(2, dtype=torch.cfloat)}, {"x": torch.ones(2, device="meta")},
        {"model": {"x": [torch.ones(2)]}},
    ],
    ids=lambda content: repr(content)[:40],
)  # fmt: skip
def test_a_torch_file_without_plain_tensors_is_one_line(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ValueError, match=r"x\.pt must hold names and plain tensors"):
        load_third_party(saved(content, tmp_path / "x.pt"))


def test_an_import_of_official_weights_that_are_no_numbers_leaves_nothing(
    tmp_path: Path, codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = random_state(model_of("universal", *SMALL))
    given["head.head.bias"][1] = float("nan")
    save_weights(given, tmp_path / "official.safetensors")
    args = [*yamls("universal"), *SMALL, f"codec={codec_folder}", f"out={tmp_path / 'out'}"]
    error = refusal(capsys, "import", str(tmp_path / "official.safetensors"), *args)
    assert "official.safetensors holds NaN or infinity in head.head.bias" in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("head.head.bias", torch.full((64,), float("nan")), r"NaN or infinity in head\.head\.bias"),
        ("head.head.bias", torch.full((64,), float("inf")), r"NaN or infinity in head\.head\.bias"),
        ("head.head.bias", torch.ones(64).long(), r"1 mistyped: head\.head\.bias"),
        ("surplus", torch.ones(1), "1 unexpected: surplus"),
    ],
)
def test_weights_that_cannot_be_played_are_named_by_their_file(
    tmp_path: Path, name: str, tensor: Tensor, match: str
) -> None:
    folder = write_checkpoint(tmp_path / "run")
    save_weights(random_dit().state_dict() | {name: tensor}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=rf"ema\.safetensors.* {match}"):
        load_world(folder)


def test_a_codec_that_is_no_numbers_or_has_no_spread_is_refused(tmp_path: Path) -> None:
    write_codec(tmp_path)
    state = load_weights(tmp_path / WEIGHTS_FILE)
    for name, value, fault in (("enter.weight", float("nan"), "NaN or infinity"), ("latent_std", 0.0, "no spread")):
        spoilt = {key: tensor.clone() for key, tensor in state.items()}
        spoilt[name].view(-1)[0] = value
        save_weights(spoilt, tmp_path / WEIGHTS_FILE)
        with pytest.raises(ValueError, match=fault):
            load_codec(tmp_path)
