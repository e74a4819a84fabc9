"""`pylora.accelerate` under methods that train something else than LoRA of linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft_models import assert_right, tiny_llama  # noqa: E402

IDS = torch.arange(3, 23).view(2, 10)
LAYERS = 14  # seven in each of the two blocks


def trained(model: nn.Module) -> Tensor:
    """All gradients in one row."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(gradients)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_prompt_tuning_is_right(base: str) -> None:
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_llama(base), config)
    report = pylora.accelerate(model, verify=1)
    assert len(report.swapped) == (LAYERS if base == "nf4" else 0) and not report.left
    assert trained(model).numel() == 4 * 64
    assert_right(model, trained)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_modules_trained_in_full_beside_lora_are_right(base: str) -> None:
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_llama(base), config)
    report = pylora.accelerate(model, verify=1)
    assert len(report.swapped) == LAYERS and not report.left
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.requires_grad
    assert_right(model, trained)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_lora_of_embeddings_is_left_to_peft_and_unharmed(base: str) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj", "lm_head"], init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_llama(base), config)
    report = pylora.accelerate(model, verify=1)
    assert {layer.reason for layer in report.left} == {
        "pylora does not compute PEFT's lora.Embedding"
    }
    head: Any = model.base_model.model.lm_head
    assert next(layer for layer in report.swapped if "lm_head" in layer.name).kind == (
        f"Linear over {type(head.base_layer).__name__}"
    )
    assert_right(model, trained)
