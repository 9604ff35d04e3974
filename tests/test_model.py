"""The transformer's properties that hold whatever the weights are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import MODELS, SMOKE, TINY, H, W, awake, inputs
from torch import Tensor

from configs import load_config
from configs.cli import Verb, run
from configs.files import sha256_file
from model.action_dit import ActionDiT
from model.config import ModelConfig
from model.info import info
from model.inputs import action_windows
from model.weights import load_into, load_weights, save_weights

F = 3  # latents


@pytest.mark.parametrize(
    ("name", "numbers", "tensors"),
    [
        ("matrix_game_2", 1_824_405_824, 1399),
        ("matrix_game_2_universal_distilled", 1_619_242_304, 1114),
        ("matrix_game_2_gta_drive_distilled", 1_619_238_464, 1114),
        ("matrix_game_2_templerun_distilled", 1_508_715_584, 964),
    ],
)
def test_an_official_variant_has_the_official_size(name: str, numbers: int, tensors: int) -> None:
    with torch.device("meta"):
        state = ActionDiT(load_config(ModelConfig, [str(MODELS / f"{name}.yaml")]).model).state_dict()
    assert (sum(tensor.numel() for tensor in state.values()), len(state)) == (numbers, tensors)


def test_info_prints_the_total_and_a_row_per_kind_of_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", {"info": Verb(info)}, ["info", str(MODELS / "demo.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "blocks.{i}.action_model.t_qkv.weight" in printed and "total" in printed


def test_a_new_model_predicts_nothing_and_its_actions_change_nothing() -> None:
    dit = ActionDiT(TINY, torch.Generator().manual_seed(0))
    assert not dit(**inputs(TINY)).any()
    added = [parameter for name, parameter in dit.named_parameters() if ".action_model.proj_" in name]
    assert len(added) == 4 and not any(parameter.any() for parameter in added)


def test_a_generator_decides_the_initial_weights() -> None:
    first, again, other = (ActionDiT(TINY, torch.Generator().manual_seed(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.ffn.0.weight"], other["blocks.0.ffn.0.weight"])


@pytest.mark.parametrize("which", ["keyboard", "mouse"])
def test_swapping_actions_changes_the_output(which: str) -> None:
    dit, given = awake(TINY), inputs(TINY, b=2)
    right = dit(**given)
    swapped = dit(**given | {which: given[which].flip(0)})
    without = dit(**given | {which: None})
    assert (right - swapped).abs().max() > 1e-2 and (right - without).abs().max() > 1e-2


@torch.no_grad()
def test_a_batch_gives_what_its_samples_give_alone() -> None:
    dit, given = awake(TINY), inputs(TINY, b=3)
    together = dit(**given)
    for i in range(3):
        alone = dit(**{name: tensor[i : i + 1] for name, tensor in given.items()})
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)  # other sums in a product of another size


@torch.no_grad()
def test_one_timestep_per_frame_that_is_the_same_everywhere_is_one_timestep_per_sample() -> None:
    dit, given = awake(TINY), inputs(TINY, b=2)
    per_frame = dit(**given | {"timestep": given["timestep"][:, None].expand(2, F)})
    assert torch.allclose(per_frame, dit(**given), atol=1e-5)
    other = given["timestep"][:, None] * torch.tensor([1.0, 0.5, 0.1])
    assert not torch.allclose(dit(**given | {"timestep": other}), per_frame, atol=1e-2)


@pytest.mark.parametrize("vision", ["tokens", "pooled"])
def test_the_image_is_seen_when_the_model_has_vision(vision: Any) -> None:
    config = replace(TINY, vision=vision, img_dim=24)
    dit, given = awake(config), inputs(config, b=2)
    swapped = dit(**given | {"visual": given["visual"].flip(0)})
    assert (dit(**given) - swapped).abs().max() > 1e-2
    with pytest.raises(ValueError, match="image tokens"):
        dit(**given | {"visual": None})


def test_a_model_without_vision_has_no_parameter_for_it() -> None:
    names = ActionDiT(TINY).state_dict()
    assert not [name for name in names if "cross_attn" in name or "norm3" in name or "img_emb" in name]


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_parameters_in_bf16_take_inputs_in_fp32_and_give_fp32(backend: str) -> None:
    config = replace(TINY, attention=backend, vision="tokens", img_dim=24)
    dit, given = awake(config), inputs(config, b=2)
    exact = dit(**given)
    rounded = dit.to(torch.bfloat16)(**given)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()  # bf16 has 8 bits; the two blocks add a few roundings
    rounded.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.parameters())


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_gives_equal_gradients(every: int) -> None:
    given = inputs(TINY, b=2)
    gradients = []
    for config in (TINY, replace(TINY, checkpoint_every=every)):
        dit = awake(config)
        dit(**given).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in dit.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_only_the_chosen_blocks_have_action_modules() -> None:
    assert TINY.action is not None
    config = replace(TINY, action=replace(TINY.action, blocks=(1,)))
    owners = {name.split(".")[1] for name in ActionDiT(config).state_dict() if "action_model" in name}
    assert owners == {"1"}


def test_a_latent_sees_the_actions_that_led_to_it_and_never_its_own_last_frames() -> None:
    actions = torch.arange(9.0)[None, :, None].requires_grad_()  # row i holds i
    windows = action_windows(actions, [0, 4, 8], 12)
    assert windows[0, :, :, 0].tolist() == [[0] * 12, [0] * 8 + [0, 1, 2, 3], [0] * 4 + list(range(8))]
    for latent, end in enumerate([0, 4, 8]):
        (seen,) = torch.autograd.grad(windows[:, latent].sum(), actions, retain_graph=True)
        assert not seen[0, max(end, 1) :].any() and seen[0, max(end - 1, 0)] > 0
    with pytest.raises(ValueError, match="one per frame"):
        action_windows(actions, [0, 4, 12], 12)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_come_back_as_they_were_with_or_without_the_official_prefix(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "model.safetensors"
    dit = awake(TINY)
    save_weights({prefix + name: tensor for name, tensor in dit.state_dict().items()}, path, {"step": "1"})
    other = awake(TINY, seed=5)
    load_into(other, load_weights(path))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in dit.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert len(sha256_file(path)) == 64


def test_weights_of_another_model_are_refused_in_one_line() -> None:
    state = ActionDiT(replace(TINY, ffn_dim=32)).state_dict()
    state["surplus"] = state.pop("head.modulation")
    with pytest.raises(ValueError, match=r"1 missing: head.modulation; 1 unexpected: surplus; 6 misshapen") as error:
        load_into(ActionDiT(TINY), state)
    assert "\n" not in str(error.value)


def test_a_truncated_weights_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model.safetensors is no complete safetensors file"):
        load_weights(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keyboard": torch.zeros(1, F, 12, 7)}, "keyboard windows"),
        ({"mouse": torch.zeros(1, F + 1, 12, 2)}, "mouse windows"),
        ({"cond": torch.zeros(1, 16, F, H, W)}, "channels of latents and cond"),
        ({"x": torch.zeros(1, 16, F, H, 5), "cond": torch.zeros(1, 20, F, H, 5)}, "patches of 2x2"),
        ({"visual": torch.zeros(1, 1, 8)}, "image tokens"),
    ],
)
def test_inputs_of_another_model_are_refused(wrong: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionDiT(TINY)(**inputs(TINY) | wrong)


@pytest.mark.parametrize("setting", ["dim=65", "patch_size=[2,2,2]", "checkpoint_every=-1", "action.blocks=[0,2]"])
def test_sizes_that_do_not_fit_together_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=setting.split("=")[0]):
        load_config(ModelConfig, [SMOKE, f"model.{setting}"])
