"""A training step of a transformers Llama on the Triton kernels has the losses of the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pylora
from pylora.backends.triton import BACKEND
from pylora.testing import assert_as_accurate_as_torch

transformers = pytest.importorskip("transformers")
if BACKEND.unavailable() is not None:
    pytest.skip(f"no Triton kernels here: {BACKEND.unavailable()}", allow_module_level=True)

DEVICE = BACKEND.device()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def qlora_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    pylora.quantize_model(model, double_quant=True)
    return pylora.add_lora(model, r=4, lora_alpha=8, lora_dropout=0.1).to(DEVICE).train()


def losses_of_two_steps(dtype: torch.dtype, model: nn.Module, tokens: Tensor) -> Tensor:
    """Returns each token's loss before and after one optimizer step in `dtype`: [2, tokens].

    The dropout seeds come from torch's generator, so they are the same on every backend.
    """
    torch.manual_seed(7)
    model = copy.deepcopy(model).to(dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for _ in range(2):
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_step_has_the_losses_of_the_reference() -> None:
    with pylora.use_backend("reference"):
        model = qlora_llama()
    tokens = torch.randint(97, (2, 10), device=DEVICE)
    with pylora.use_backend("triton"):
        losses = losses_of_two_steps(torch.float32, model, tokens)
    assert losses[1].mean() < losses[0].mean()
    with pylora.use_backend("reference"):
        assert_as_accurate_as_torch(losses, losses_of_two_steps, torch.float32, model, tokens)
