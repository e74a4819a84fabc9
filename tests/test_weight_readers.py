"""Layers whose weight other code reads: no LoRA that has no effect, no packed bytes as numbers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.models.weight_readers import reading_of
from pylora.nn import LoRALinear, NF4Linear

transformers = pytest.importorskip("transformers")


class Multiplies(nn.Module):
    """Reads the values of one weight and the dtype of another."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.asked, self.called = (nn.Linear(64, 64) for _ in range(3))
        self.read.weight.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.asked.weight.dtype))
        assert isinstance(self.called.weight, Tensor) and self.called.weight.device == x.device
        return self.asked(x) @ self.read.weight.t()


class Inherits(Multiplies):
    pass


@pytest.mark.parametrize("kind", [Multiplies, Inherits])
def test_what_a_class_reads(kind: type) -> None:
    assert reading_of(kind).values == {"read"}
    assert reading_of(kind).dtypes == {"asked"}


def test_a_class_without_a_file() -> None:
    kind = type("Made", (nn.Module,), {})
    assert not reading_of(kind).values


def test_all_linear_leaves_a_weight_that_is_read(caplog: pytest.LogCaptureFixture) -> None:
    model = pylora.add_lora(nn.Sequential(Inherits()), r=2)
    wrapped = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert wrapped == {"0.asked", "0.called"}
    assert "0.read gets no LoRA: Inherits reads its weight itself" in caplog.text
    model(torch.randn(2, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_weight_that_is_read_is_no_target() -> None:
    model = nn.Sequential(Multiplies())
    with pytest.raises(ValueError, match=r"0\.read must not be a target of LoRA: Multiplies reads"):
        pylora.add_lora(model, target_modules=["called", "read"])
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_weight_that_is_read_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(Multiplies()), torch.randn(2, 64)
    pylora.quantize_model(model)
    quantized = {n for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert quantized == {"0.called"}
    assert "0.asked stays dense: Multiplies asks for the dtype of its weight" in caplog.text
    assert model(x).shape == (2, 64)


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_mamba_trains_all_that_is_trainable(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=48, hidden_size=32, state_size=4, num_hidden_layers=1
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    pylora.add_lora(pylora.quantize_model(model), r=2)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(dict(model.named_parameters())[n].grad is not None for n in trained)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("quantized", [False, True])
def test_torch_encoder_layer_in_eval_mode(activation: str, quantized: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 96, 0.0, activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    if quantized:
        pylora.quantize_model(model)
    pylora.add_lora(model, r=2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))


def test_what_an_inner_model_declares_as_float32_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = transformers.T5Config(
        vocab_size=48, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4
    )
    model = nn.ModuleDict({"encoder": transformers.T5EncoderModel(config), "out": nn.Linear(64, 3)})
    pylora.quantize_model(model)
    assert type(model["encoder"].encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear
    assert isinstance(model["out"], NF4Linear)
    assert "wo stays dense: the model declares it as float32-only" in caplog.text
