"""PEFT's `adapter_names` over accelerated layers: one adapter a row, also in training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylora
from pylora import dispatch
from pylora.calls import MultiLoraCall

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft_models import assert_right, outcome, tiny_llama  # noqa: E402

from benchmarks.models.bitsandbytes_layers import linear4bit  # noqa: E402

NAMES = ["default", "wide", "__base__", "up", "wide", "default"] * 4  # errors of few rows are luck
ROWS = torch.arange(24 * 5).view(24, 5) % 32
BASES = ["dense", "nf4", "nf4 doubly quantized"]
ADAPTERS = ["default", "up", "wide"]


class TwoLayers(nn.Module):
    """Linear layers over the tokens of a batch, or over its rows if `per_row`.

    They are small because torch, which runs each row alone, sums over many features more accurately
    than it does in a batch.
    """

    def __init__(self, per_row: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 8)
        self.per_row = per_row

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x.mean(1) if self.per_row else x
        return self.head(x + self.down(torch.tanh(self.up(x))))


def lora(**settings: Any) -> Any:
    settings = {"r": 4, "target_modules": ["up", "down"], **settings}
    return peft.LoraConfig(init_lora_weights=False, **settings)


def peft_model(base: str, per_row: bool = False, **settings: Any) -> Any:
    """A model with adapters of several ranks, scalings and targets."""
    torch.manual_seed(0)
    model: Any = TwoLayers(per_row)
    if base != "dense":
        model.up, model.down = (linear4bit(m, "doubly" in base) for m in (model.up, model.down))
        model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, lora(**settings))
    model.add_adapter("wide", lora(r=9, lora_alpha=3, use_rslora=True, **settings))
    model.add_adapter("up", lora(r=3, target_modules=["up"]))
    train_all(model)
    return model.train()


def train_all(model: Any) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def row_by_row(model: Any, ids: Tensor, names: Sequence[str]) -> Tensor:
    """What each row gives when it runs alone, with its adapter alone."""
    outputs = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(model(row[None]))
        else:
            model.base_model.set_adapter(name)
            outputs.append(model(row[None]))
        train_all(model)
    return torch.cat(outputs)


def run(model: Any) -> tuple[Tensor, Tensor]:
    """Output and gradients: in one batch if the model is accelerated, else row by row."""
    if any("forward" in vars(module) for module in model.modules()):
        return outcome(model, ROWS, adapter_names=NAMES)
    train_all(model)
    whole = nn.ModuleDict({"model": model})
    whole.forward = lambda ids: row_by_row(model, ids, NAMES)
    return outcome(whole, ROWS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The types of the calls that are dispatched."""
    seen: list[type] = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda call: seen.append(type(call)) or choose(call))
    return seen


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_training_gives_the_gradients_of_every_row_alone(
    base: str, per_row: bool, calls: list[type]
) -> None:
    model = peft_model(base, per_row)
    pylora.accelerate(model, strict=True, verify=1)
    assert_right(model, run)
    assert calls.count(MultiLoraCall) == 2 * 3  # the second time on the reference, in two dtypes
    assert_right(model.eval(), run)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_layers_with_a_bias_or_dropout_are_left_to_peft_and_right(
    base: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = peft_model(base, lora_bias=True)
    pylora.accelerate(model)
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        assert_right(model, run)
    assert "the lora_B of adapter default has a bias" in caplog.text
    model = peft_model(base, lora_dropout=0.5)
    pylora.accelerate(model)
    with caplog.at_level(logging.INFO, "pylora.integrations.swaps"):
        first, second = model(ROWS, adapter_names=NAMES), model(ROWS, adapter_names=NAMES)
    assert "trained with dropout" in caplog.text
    assert torch.equal(first[2], second[2])  # the base alone
    assert not any(torch.equal(first[row], second[row]) for row in (0, 1))
    assert_right(model.eval(), run)


def test_modules_to_save_follow_the_names() -> None:
    model = peft_model("nf4", modules_to_save=["head"])
    pylora.accelerate(model)
    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    for parameter in trained:
        nn.init.normal_(parameter.requires_grad_(False))
    names = ["default", "wide"]

    def together(model: Any) -> Tensor:
        if any("forward" in vars(module) for module in model.modules()):
            return model(ROWS[:2], adapter_names=names).detach()
        return row_by_row(model, ROWS[:2], names).detach()

    assert_right(model, together)


def test_restore_and_unpatch_bring_back_the_refusal_of_peft() -> None:
    model = peft_model("dense")
    refused = pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in tr")
    for _ in range(2):
        pylora.accelerate(model)
    twin = copy.deepcopy(model)
    pylora.restore(model)
    with refused:
        model(ROWS, adapter_names=NAMES)
    assert twin(ROWS, adapter_names=NAMES).requires_grad
    for _ in range(2):
        pylora.patch()
    expected = twin(ROWS, adapter_names=NAMES)
    assert torch.equal(model(ROWS, adapter_names=NAMES), expected)
    pylora.unpatch()
    with refused:
        model(ROWS, adapter_names=NAMES)


@pytest.mark.parametrize(
    "names, message",
    [
        (NAMES[:2], "Length of `adapter_names` should be the same as the number of inputs"),
        (["none"] * 6, "Trying to infer with non-existing adapter"),
    ],
)
def test_the_errors_are_those_of_peft(names: list[str], message: str) -> None:
    model = peft_model("nf4")
    pylora.accelerate(model)
    for training in (True, False):
        with pytest.raises(ValueError, match=message):
            model.train(training)(ROWS, adapter_names=names)
    for module in model.modules():  # PEFT leaves its hooks behind after an error
        module._forward_pre_hooks.clear()
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(ROWS, adapter_names=NAMES)


def llama() -> Any:
    every = lora(target_modules="all-linear")
    model = peft.get_peft_model(tiny_llama("dense"), every)
    model.add_adapter("wide", lora(r=9, target_modules="all-linear"))
    model.add_adapter("up", lora(r=3, target_modules=["up_proj"]))
    train_all(model)
    return model.train()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_computes_again_with_the_same_names(use_reentrant: bool) -> None:
    model = llama()
    pylora.accelerate(model, strict=True)
    batch = {"input_ids": ROWS, "labels": ROWS, "output": "loss", "adapter_names": NAMES}
    expected = outcome(model, **batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for actual, value in zip(outcome(model, **batch), expected, strict=True):
        assert torch.equal(actual, value)
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    assert hooked == [model.get_output_embeddings()]  # which has that of pylora.accelerate


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_another_checkpoint_is_refused(use_reentrant: bool) -> None:
    model = peft_model("nf4")
    pylora.accelerate(model)
    inner = model.base_model.model
    inner.embed.weight.requires_grad_(True)
    layer = inner.up

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(layer, x, use_reentrant=use_reentrant)

    inner.up_again = layer
    inner.up = Checkpointed()
    y = model(ROWS, adapter_names=NAMES)
    with pytest.raises(RuntimeError, match="computes it again without them"):
        y.sum().backward()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_gives_what_every_row_gives_alone(num_beams: int) -> None:
    model = llama().eval()
    pylora.accelerate(model, strict=True)
    settings = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False}
    together = model.generate(input_ids=ROWS, adapter_names=NAMES, **settings)
    for row, name, expected in zip(ROWS, NAMES, together, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=row[None], **settings)
        else:
            model.base_model.set_adapter(name)
            alone = model.generate(input_ids=row[None], **settings)
        assert torch.equal(alone[0], expected)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    pylora.unpatch()
