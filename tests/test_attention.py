"""Every backend that runs here against the dense one, and one line for those that do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import load_config
from configs.errors import UserError
from model.attention import BACKENDS, AttentionBackend, attend, flash_attention
from model.config import ModelConfig
from model.masks import BlockCausal, BlockCausalMask

RULES = [BlockCausal(3), BlockCausal(2, 5), BlockCausal(3, 7, 2)]


def tokens(mask: BlockCausalMask, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, mask.frames * mask.queries, 2, 16, generator=generator)
    k, v = torch.randn(2, 2, mask.frames * mask.keys, 2, 16, generator=generator)
    return q, k, v


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("frames", "s"), [(8, 16), (7, 5)])  # 128 tokens, a whole block of flex_attention, and 35
def test_backends_agree_under_a_mask(backend: AttentionBackend, rule: BlockCausal, frames: int, s: int) -> None:
    mask = BlockCausalMask(rule, frames, s, s)
    q, k, v = tokens(mask)
    assert torch.allclose(attend(q, k, v, mask, backend), attend(q, k, v, mask, "dense"), atol=1e-6)
    assert torch.allclose(attend(q, k, v, None, backend), attend(q, k, v, None, "dense"), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_sdpa_and_dense_have_equal_gradients(rule: BlockCausal) -> None:
    mask, gradients = BlockCausalMask(rule, 7, 4, 4), []
    for backend in ("sdpa", "dense"):
        q, k, v = (tensor.requires_grad_() for tensor in tokens(mask))
        attend(q, k, v, mask, backend).square().sum().backward()
        gradients.append([q.grad, k.grad, v.grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("gives", [lambda out: out, lambda out: (out, None)], ids=["tensor", "tuple"])
def test_flash_attention_is_right_whichever_of_its_return_values_comes(gives: Any) -> None:
    mask = BlockCausalMask(BlockCausal(3, 6, 1), 9, 4, 4)
    q, k, v = tokens(mask)
    for masked in (mask, None):
        attended = flash_attention(q, k, v, masked, lambda *qkv: gives(attend(*qkv)))
        assert torch.allclose(attended, attend(q, k, v, masked, "dense"), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "dense"])
def test_backends_agree_on_a_gpu(backend: AttentionBackend) -> None:
    mask = BlockCausalMask(BlockCausal(3, 6), 9, 220, 220)
    q, k, v = (tensor.cuda().bfloat16() for tensor in tokens(mask))
    for masked in (mask, None):
        exact = attend(q.float(), k.float(), v.float(), masked, "dense")
        try:
            attended = attend(q, k, v, masked, backend)
        except ValueError as error:
            pytest.skip(str(error))
        assert torch.allclose(attended.float(), exact, atol=2e-2)  # bf16 has 8 bits


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_backend_that_cannot_run_here_says_what_it_needs() -> None:
    mask = BlockCausalMask(BlockCausal(3), 6, 2, 2)
    q, k, v = tokens(mask)
    with pytest.raises(ValueError, match=r"flash_attn needs a CUDA GPU and FlashAttention: pip install"):
        attend(q, k, v, mask, "flash_attn")
    with pytest.raises(ValueError, match="flex trains on a CUDA GPU only"):
        attend(q.requires_grad_(), k, v, mask, "flex")


def test_a_backend_that_there_is_not_is_refused_when_the_settings_are_read() -> None:
    smoke = str(Path(__file__).parent.parent / "configs" / "models" / "smoke.yaml")
    with pytest.raises(UserError, match=r"model\.attention.*sdpa, dense, flex, flash_attn"):
        load_config(ModelConfig, [smoke, "model.attention=magic"])
