"""Models of PEFT and bitsandbytes, and the measure of what an accelerated one computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

import pylora
from benchmarks.models.bitsandbytes_layers import in_4bit
from pylora.nn import NF4Linear
from pylora.testing import assert_as_accurate_as_torch


def tiny_llama(base: str, blocks: int = 2) -> Any:
    """A Llama with the same weights each time; its bases are "dense" or "nf4"."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,  # bitsandbytes misreads rows that end within a block on AVX-512
        num_hidden_layers=blocks,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).float()
    return in_4bit(model) if base == "nf4" else model


def with_dense_bases(model: nn.Module) -> nn.Module:
    """A copy of a model with the weights of its 4-bit layers in their compute dtype."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                dense = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dense.weight = nn.Parameter(
                    NF4Linear.from_bitsandbytes(child).nf4_weight.dequantize(child.compute_dtype),
                    requires_grad=False,
                )
                dense.bias = child.bias
                if child.bias is not None:  # bitsandbytes casts it in the first forward
                    child.bias.data = child.bias.data.to(child.compute_dtype)
                module._modules[name] = dense
    return model


def outcome(
    model: nn.Module, *args: Any, output: str | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The output, or an attribute of it, and the gradients of its mean square in one row."""
    y = model(*args, **kwargs)
    y = y if output is None else getattr(y, output)
    trained = [p for p in model.parameters() if p.requires_grad]
    y.float().square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    model.zero_grad()
    return y.detach(), gradients


def assert_right(
    model: nn.Module, run: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32
) -> None:
    """What `run` gives with the accelerated model is as accurate as in plain torch.

    The same modules over dense bases, in `dtype` and in float64, are the measure.
    """
    plain = with_dense_bases(model)
    pylora.restore(plain)
    assert_as_accurate_as_torch(
        run(model),
        lambda dtype: run(plain.double() if dtype == torch.float64 else copy.deepcopy(plain)),
        dtype,
    )
