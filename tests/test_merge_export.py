"""merge into a dense 16-bit model, and the report of what merging does to the outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import NF4Linear
from pylora.testing import assert_as_accurate_as_torch

transformers = pytest.importorskip("transformers")


def tiny_llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attention_bias=True,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def trained(model: Any, **lora: Any) -> Any:
    pylora.add_lora(model, r=4, **lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_export_is_what_was_trained_over_rounded_once(
    dtype: torch.dtype, variant: dict[str, Any]
) -> None:
    model = trained(
        pylora.quantize_model(tiny_llama(), double_quant=True),
        target_modules=["q_proj", "up_proj"],
        **variant,
    )
    layer = model.model.layers[0].self_attn.q_proj
    untouched = model.model.layers[1].mlp.down_proj.nf4_weight
    expected = layer.merged_weight().to(dtype)
    bias = layer.bias.detach().float()
    if layer.lora_B_bias is not None:
        bias = bias + layer.scaling * layer.lora_B_bias.detach()
    report = pylora.merge(model, keep_base=False, dtype=dtype)
    assert not any(isinstance(m, (NF4Linear, pylora.nn.LoRALinear)) for m in model.modules())
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias.to(dtype))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, untouched.dequantize(dtype))
    assert {row.kind for row in report.layers} == {str(dtype).removeprefix("torch.")}
    rounding = torch.finfo(dtype).eps / 2
    assert report.total.error_of_weight <= rounding


def test_an_export_is_a_plain_checkpoint(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    # A cast would round the frequencies of the position embedding, which no checkpoint holds.
    model = load(tmp_path / "base", dtype=torch.bfloat16)
    trained(pylora.quantize_model(model, double_quant=True))
    pylora.merge(model, keep_base=False, dtype=torch.bfloat16)
    ids = torch.randint(97, (2, 9))
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    loaded = load(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16 and type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_an_export_that_fails_changes_nothing() -> None:
    model = trained(pylora.quantize_model(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))))
    with torch.no_grad():
        model[1].lora_B.fill_(1e6)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1: the merged weight is too large for torch\.float16"):
        pylora.merge(model, keep_base=False, dtype=torch.float16)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.bfloat16}, ValueError, "keep_base must be False"),
        ({"dtype": torch.int8, "keep_base": False}, TypeError, "dtype is torch.int8"),
    ],
)
def test_bad_exports_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = trained(pylora.quantize_model(nn.Sequential(nn.Linear(64, 8))))
    with pytest.raises(error, match=message):
        pylora.merge(model, **arguments)
    assert not model[0].merged


class Skewed(nn.Module):
    """Two layers; inputs lie in a small part of the space, as they do in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.first(x).relu() * scale)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_the_report_has_the_error_of_the_outputs(quantized: bool) -> None:
    model: Any = Skewed()
    if quantized:
        pylora.quantize_model(model)
    trained(model, lora_dropout=0.5)
    x = torch.randn(5, 7, 3) @ torch.randn(3, 64)
    before = copy.deepcopy(model).eval()
    report = pylora.merge(model, example={"x": x, "scale": 2.0})
    assert model.training and model.first.training
    rows = {row.name: row for row in report.layers}
    assert rows["unused"].error_of_output is None and "output" not in str(rows["unused"])
    second_input = before.first(x).relu() * 2.0
    for name, given in (("first", x), ("second", second_input)):
        layer, merged = getattr(before, name), getattr(model, name)

        def output_error(given: Tensor, exact: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
            error = nn.functional.linear(given, merged - exact).norm()
            return error, nn.functional.linear(given, exact).norm()

        weight = merged.base_weight
        weight = weight.dequantize(torch.float32) if quantized else weight
        actual = tuple(torch.tensor([rows[name].output_error, rows[name].output]))
        exact = layer.merged_weight()
        assert_as_accurate_as_torch(actual, output_error, given.detach(), exact, weight.detach())
    assert f"{report.total.error_of_output:.3%} of the output" in repr(report)


def test_the_error_of_the_weight_is_that_of_outputs_for_white_inputs() -> None:
    model = trained(pylora.quantize_model(nn.Sequential(nn.Linear(64, 96, bias=False))))
    report = pylora.merge(model, example=64**0.5 * torch.linalg.qr(torch.randn(64, 64)).Q)
    row = report.layers[0]
    assert row.error_of_output == pytest.approx(row.error_of_weight, rel=1e-4)


@pytest.mark.parametrize("as_argument", [lambda x: x, lambda x: (x,), lambda x: [x]])
def test_an_example_may_be_the_only_argument(as_argument: Any) -> None:
    model = trained(pylora.quantize_model(nn.Sequential(nn.Linear(64, 8))))
    assert pylora.merge(model, example=as_argument(torch.randn(3, 64))).layers[0].error_of_output
