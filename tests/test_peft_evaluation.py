"""A validation pass between training steps over bitsandbytes' layers changes nothing.

On a CPU with AVX-512 BF16, bitsandbytes repacks a layer's weight in its first forward in eval mode.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import pylora

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft_models import tiny_llama  # noqa: E402

IDS = torch.arange(3, 23).view(2, 10)
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10}


def peft_model(method: str) -> Any:
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "lora_dropout": 0.1}
    if method == "AdaLoRA":
        config = peft.AdaLoraConfig(**settings, **ADALORA)
    else:
        config = peft.LoraConfig(**settings, r=4, use_dora=method == "DoRA")
    model = peft.get_peft_model(tiny_llama("nf4", 1), config)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    return model


@torch.no_grad()
def evaluate(model: Any) -> None:
    state = torch.get_rng_state()
    model.eval()
    model(IDS, labels=IDS)
    with model.disable_adapter():
        model(IDS)
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    model.train()
    torch.set_rng_state(state)


def losses(model: Any, evaluated: bool) -> list[Tensor]:
    """The losses of six steps, with an evaluation before and after each if `evaluated`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    torch.manual_seed(1)
    found = []
    for _ in range(6):
        if evaluated:
            evaluate(model)
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    if evaluated:
        evaluate(model)
    return found


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA"])
@pytest.mark.parametrize("how", ["accelerate", "patch"])
def test_training_is_the_same_bit_for_bit_with_and_without_evaluation(
    method: str, how: str
) -> None:
    models = [peft_model(method) for _ in range(2)]
    try:
        if how == "patch":
            pylora.patch()
        else:
            for model in models:
                pylora.accelerate(model, strict=True)
        evaluated, plain = (losses(m, e) for m, e in zip(models, (True, False), strict=True))
    finally:
        pylora.unpatch()
    assert all(map(torch.equal, evaluated, plain))
    assert plain[-1] < plain[0]
    assert_same_state(*models)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_what_is_saved_and_merged_after_an_evaluation_is_right() -> None:
    model = peft_model("LoRA")
    before = copy.deepcopy(model)
    pylora.accelerate(model, strict=True)
    losses(model, evaluated=True)
    bases = {k: v for k, v in model.state_dict().items() if "base_layer" in k}
    assert bases and all(torch.equal(v, before.state_dict()[k]) for k, v in bases.items())
    peft.set_peft_model_state_dict(before, peft.get_peft_model_state_dict(model))
    for each in (model, before):
        each.merge_adapter()
    assert_same_state(model, before)
    assert_same_state(*(each.merge_and_unload() for each in (model, before)))


def assert_same_state(ours: Any, theirs: Any) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
