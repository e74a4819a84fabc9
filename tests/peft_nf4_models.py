"""A tiny NF4 model with adapters of PEFT, and the same model over dense weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import NF4Linear

IDS = torch.arange(3, 23).view(2, 10)


def nf4_model(layers: int = 1, bias: bool = False) -> Any:
    """A random Llama with every linear layer but the head in NF4."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        attention_bias=bias,
    )
    torch.manual_seed(0)
    model = pylora.quantize_model(transformers.LlamaForCausalLM(config), double_quant=True)
    return spread(model.requires_grad_(False), only="bias")


def dense_twin(model: nn.Module) -> Any:
    """A copy with the dequantized weights in plain layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NF4Linear):
                dense = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                weight = child.nf4_weight.dequantize(child.weight_dtype)
                dense.weight = nn.Parameter(weight, requires_grad=False)
                dense.bias = child.bias
                setattr(module, name, dense)
    return model


def adapted(model: nn.Module, config: Any, **options: Any) -> Any:
    """The model with an adapter whose parameters do something."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return spread(peft.get_peft_model(model, copy.deepcopy(config), **options))


def spread(model: Any, only: str = "") -> Any:
    """Adds noise to the trained parameters, or to those with `only` in their names."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name if only else parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.02)
    return model


def trained(model: Any, **inputs: Any) -> list[Tensor]:
    """The logits and gradients of two steps, the parameters after them, and the logits at last."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    seen = []
    for _ in range(2):
        logits = model(input_ids=IDS, **inputs).logits
        logits.square().mean().backward()
        seen += [logits.detach(), torch.cat([p.grad.flatten() for p in parameters])]
        optimizer.step()
        optimizer.zero_grad()
    seen.append(torch.cat([p.detach().flatten() for p in parameters]))
    with torch.no_grad():
        return [*seen, model(input_ids=IDS, **inputs).logits]


def logits(model: Any) -> Tensor:
    """What the model computes in eval mode."""
    was_training = model.training
    with torch.no_grad():
        y: Tensor = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return y


def nf4_bytes(model: nn.Module) -> list[Tensor]:
    """A copy of all that holds the NF4 weights of the model, and of their biases."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return [
        p.detach().clone() for layer in layers for p in layer._parameters.values() if p is not None
    ]
