"""`pylora.accelerate` on the model families of transformers: training stays right.

Each model is tiny and random. Its linear layers carry PEFT's LoRA, over dense weights or over
bitsandbytes' NF4.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pylora

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft_models import assert_right  # noqa: E402

from benchmarks.models.bitsandbytes_layers import in_4bit  # noqa: E402
from benchmarks.models.families import DENSE, FAMILIES, Family  # noqa: E402
from benchmarks.models.measure import Training  # noqa: E402


def trained(model: nn.Module, family: Family) -> Tensor:
    """The gradients of three steps of training, in one row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    inputs, gradients = family.inputs(parameters[0].dtype), []
    for _ in range(3):
        output = getattr(model(**inputs), family.output)
        output.square().mean().backward()
        gradients += [p.grad.flatten() for p in parameters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat(gradients)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_training_steps_of_a_family_are_right(family: str, base: str) -> None:
    row = FAMILIES[family]
    torch.manual_seed(0)
    model = row.build()
    if base == "nf4":
        model = in_4bit(model, DENSE)
    lora = peft.LoraConfig(r=4, lora_alpha=2, target_modules=row.targets, init_lora_weights=False)
    model = peft.get_peft_model(model, lora).train()
    report = pylora.accelerate(model, verify=1)
    assert len([layer for layer in report.swapped if " over " in layer.kind]) == row.swapped
    assert {layer.reason for layer in report.left} == row.left
    assert_right(model, lambda model: trained(model, row))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_family_needs_less_memory_over_4_bit_layers(family: str) -> None:
    """Less than PEFT over bitsandbytes, which decodes the whole weight in a backward."""
    row = FAMILIES[family]
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=row.targets)
    peer = peft.get_peft_model(in_4bit(row.build(scale=4), DENSE), lora).train()
    training = Training(peer, row.inputs(torch.float32, repeat=2), row.output)
    training.step()  # the optimizer makes its state
    theirs = training.peak_bytes()
    pylora.accelerate(peer)
    training.step()
    assert training.peak_bytes() < theirs
