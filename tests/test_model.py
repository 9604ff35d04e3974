"""The transformer's properties that hold whatever the weights are."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_model import CAUSAL, MODELS, SMOKE, TINY, H, W, awake, inputs
from torch import Tensor

from configs import load_config
from configs.cli import Verb, run
from model.action_dit import ActionDiT
from model.config import ActionDiTConfig, ModelConfig
from model.info import info
from model.inputs import action_windows

F = 3  # latents


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
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)  # sums in another order, of up to 14


@torch.no_grad()
def test_one_timestep_per_frame_that_is_the_same_everywhere_is_one_timestep_per_sample() -> None:
    dit, given = awake(TINY), inputs(TINY, b=2)
    per_frame = dit(**given | {"timestep": given["timestep"][:, None].expand(2, F)})
    assert torch.allclose(per_frame, dit(**given), rtol=1e-4, atol=1e-4)
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


@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["bidirectional", "causal"])
def test_activation_checkpointing_gives_equal_gradients(config: ActionDiTConfig) -> None:
    gradients = []
    for every in (0, 1, 2):
        dit = awake(replace(config, checkpoint_every=every))
        dit(**inputs(config, b=2, f=6)).square().mean().backward()
        gradients.append([parameter.grad for parameter in dit.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_a_part_that_is_switched_off_has_no_parameter() -> None:
    assert TINY.action is not None  # and no vision
    names = ActionDiT(replace(TINY, action=replace(TINY.action, blocks=(1,)))).state_dict()
    assert not [name for name in names if "cross_attn" in name or "norm3" in name or "img_emb" in name]
    assert {name.split(".")[1] for name in names if "action_model" in name} == {"1"}


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


def test_a_latent_sees_the_actions_that_led_to_it_and_never_its_own_last_frames() -> None:
    actions = torch.arange(9.0)[None, :, None].requires_grad_()  # row i holds i
    windows = action_windows(actions, [0, 4, 8], 12)
    assert windows[0, :, :, 0].tolist() == [[0] * 12, [0] * 8 + [0, 1, 2, 3], [0] * 4 + list(range(8))]
    for latent, end in enumerate([0, 4, 8]):
        (seen,) = torch.autograd.grad(windows[:, latent].sum(), actions, retain_graph=True)
        assert not seen[0, max(end, 1) :].any() and seen[0, max(end - 1, 0)] > 0
    with pytest.raises(ValueError, match="one per frame"):
        action_windows(actions, [0, 4, 12], 12)


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
