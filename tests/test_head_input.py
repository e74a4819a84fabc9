"""A frozen dense output head gets its input with rows that follow each other in memory.

Otherwise torch copies the head's weight for each sequence of a batch.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pylora
from pylora.nn import LoRALinear

STEPS = 5


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()


def with_peft(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def accelerated(model: nn.Module) -> nn.Module:
    model = with_peft(model)
    pylora.accelerate(model)
    return model


def lora(model: nn.Module) -> nn.Module:
    return pylora.add_lora(model, target_modules=["q_proj"])


WAYS = {"add_lora": lora, "quantize_model": pylora.quantize_model, "accelerate": accelerated}


class _Linears(torch.overrides.TorchFunctionMode):
    """Records the strides of what torch's linear is given for a head of 50 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[tuple[int, ...]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear and args[1].shape[0] == 50:
            self.strides.append(args[0].stride())
        return function(*args, **(kwargs or {}))


def strides_at_the_head(model: nn.Module, batch: int) -> list[tuple[int, ...]]:
    tokens = torch.arange(batch * STEPS).view(batch, STEPS) % 50
    with _Linears() as linears, torch.no_grad():
        model(tokens, logits_to_keep=1)
    return linears.strides


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", list(WAYS))
def test_the_last_tokens_follow_each_other(way: str, batch: int) -> None:
    far_apart, in_order = (STEPS * 64, 64, 1), (64, 64, 1)
    assert strides_at_the_head(llama(), batch) == [far_apart]
    model = WAYS[way](llama())
    assert strides_at_the_head(model, batch) == [in_order]
    assert strides_at_the_head(copy.deepcopy(model), batch) == [in_order]


@pytest.mark.parametrize("way", list(WAYS))
def test_the_logits_stay_the_same(way: str) -> None:
    tokens = torch.arange(6).view(2, 3)
    model = WAYS[way](llama())
    (expected, actual) = (model(tokens, logits_to_keep=keep).logits[:, -1] for keep in (0, 1))
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()


def test_the_hook_is_set_once_and_restore_removes_it() -> None:
    model = with_peft(llama())
    head = model.get_output_embeddings()
    for _ in range(2):
        pylora.accelerate(model)
        assert len(head._forward_pre_hooks) == 1
    torch.save(model, io.BytesIO())  # the hook can be pickled
    pylora.restore(model)
    assert not head._forward_pre_hooks


def test_a_hook_of_the_user_stays() -> None:
    seen: list[Tensor] = []
    model = with_peft(llama())
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pylora.accelerate(model)
    pylora.restore(model)
    strides_at_the_head(model, 2)
    assert len(seen) == 1 and len(head._forward_pre_hooks) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lora_over_a_dense_head_multiplies_a_matrix(dtype: torch.dtype) -> None:
    """So torch copies no weight, whatever the strides of x are."""
    layer = LoRALinear(nn.Linear(64, 50, dtype=torch.bfloat16), dtype=dtype)
    x = torch.randn(40, STEPS, 64, dtype=torch.bfloat16)[:, -1:]

    def products(run: Callable[[], Any]) -> set[str]:
        with torch.profiler.profile() as profile, torch.no_grad():
            run()
        return {event.key for event in profile.key_averages()}

    assert "aten::bmm" in products(lambda: layer.base_layer(x))
    assert "aten::bmm" not in products(lambda: layer(x))
