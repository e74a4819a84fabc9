"""merge and unmerge: the merged function, exact restoration, the report, failures that undo."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import LoRALinear, NF4Linear
from pylora.testing import assert_as_accurate_as_torch

BASES = ["dense", "bf16", "nf4", "nf4-double"]
VARIANTS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"lora_bias": True, "use_rslora": True}]


def model_of(base_format: str, scale: float = 0.05, **lora: Any) -> nn.Sequential:
    dtype = torch.bfloat16 if base_format == "bf16" else torch.float32
    model = nn.Sequential(
        nn.Linear(64, 96, bias=False, dtype=dtype), nn.ReLU(), nn.Linear(96, 64, dtype=dtype)
    )
    if base_format.startswith("nf4"):
        pylora.quantize_model(model, blocksize=32, double_quant=base_format == "nf4-double")
    pylora.add_lora(model, r=4, lora_alpha=8, **lora)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_B.normal_(0, scale)
            for parameter in (layer.lora_B_bias, layer.lora_magnitude):
                if parameter is not None:
                    parameter.add_(scale * torch.rand_like(parameter))
    return model


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = model.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "dora", "bias-rslora"])
@pytest.mark.parametrize("base_format", BASES)
def test_a_merged_layer_is_its_base(base_format: str, variant: dict[str, Any]) -> None:
    """The merged base has the error that the report gives."""
    model = model_of(base_format, **variant)
    layer = model[2]
    target = layer.merged_weight()
    target_bias = layer.bias.detach().float()
    if layer.lora_B_bias is not None:
        target_bias = target_bias + layer.scaling * layer.lora_B_bias.detach()
    x = torch.randn(7, 96, dtype=layer.bias.dtype)
    unmerged = layer(x)
    report = pylora.merge(model)
    assert layer.merged and "merged" in repr(layer)
    merged = layer.base_weight
    merged = merged.dequantize(torch.float32) if base_format.startswith("nf4") else merged.float()
    row = report.layers[1]
    assert row.name == "2"
    error = (merged - target).double().norm()
    assert row.error == pytest.approx(float(error), rel=1e-5)
    assert row.weight == pytest.approx(float(target.double().norm()), rel=1e-6)
    actual = layer(x)
    assert torch.equal(actual, layer.base_layer(x))
    bias = layer.bias.detach()
    assert torch.equal(bias, target_bias.to(bias.dtype))
    assert_as_accurate_as_torch(actual, nn.functional.linear, x, merged.to(x.dtype), bias)
    if base_format == "dense":
        assert row.error_of_weight < 1e-7
        torch.testing.assert_close(actual, unmerged)
    # The merged and the unmerged function differ only by the rounding of the base.
    allowed = float(error) * x.double().norm(dim=1).max() + 0.1 * (base_format == "bf16") + 1e-3
    assert (actual - unmerged).double().norm(dim=1).max() <= allowed


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "dora", "bias-rslora"])
@pytest.mark.parametrize("base_format", BASES)
def test_unmerge_restores_the_same_bytes_over_cycles(
    base_format: str, variant: dict[str, Any]
) -> None:
    model = model_of(base_format, **variant)
    before = base_state(model)
    x = torch.randn(3, 64, dtype=torch.bfloat16 if base_format == "bf16" else torch.float32)
    expected = model(x)
    merged_states = []
    for _ in range(3):
        pylora.merge(model)
        merged_states.append(base_state(model))
        pylora.unmerge(model)
        assert_state(model, before)
    assert torch.equal(model(x), expected)
    for state in merged_states[1:]:
        assert all(torch.equal(state[k], merged_states[0][k]) for k in state)


def test_the_report_adds_up() -> None:
    report = pylora.merge(model_of("nf4"))
    assert [row.name for row in report.layers] == ["0", "2"]
    assert all(row.kind == "nf4" and row.error > 0 for row in report.layers)
    total = report.total
    for name in ("error", "delta", "weight"):
        squares = sum(getattr(row, name) ** 2 for row in report.layers)
        assert getattr(total, name) == pytest.approx(math.sqrt(squares))
    assert total.error_of_delta == total.error / total.delta
    text = repr(report)
    assert text.startswith("MergeReport\n") and "2 layers" in text and "of delta" in text


def test_a_small_delta_is_reported_as_lost() -> None:
    """NF4 rounds a delta away if it is far smaller than the steps, and the report must say so."""
    report = pylora.merge(model_of("nf4", scale=1e-5))
    assert report.total.error_of_delta > 0.5
    assert pylora.merge(model_of("dense", scale=1e-5)).total.error_of_delta < 0.01


def test_an_untrained_adapter_changes_nothing() -> None:
    for base_format in BASES:
        model = nn.Sequential(nn.Linear(64, 96))
        if base_format.startswith("nf4"):
            pylora.quantize_model(model, double_quant=base_format == "nf4-double")
        pylora.add_lora(model, r=4, use_dora=True)
        before = base_state(model)
        report = pylora.merge(model)
        assert_state(model, before)
        assert report.total.error_of_delta == 0.0
        assert report.total.error_of_weight == 0.0


def test_a_merge_keeps_the_quantization_settings() -> None:
    model = model_of("nf4-double")
    model.bfloat16()
    pylora.merge(model)
    base = model[0].base_layer
    assert isinstance(base, NF4Linear)
    assert base.blocksize == 32 and base.double_quant and base.weight_dtype == torch.float32


def test_keep_base_false_leaves_plain_layers() -> None:
    model = model_of("nf4")
    x = torch.randn(3, 64)
    pylora.merge(model, keep_base=False)
    merged = model_of("nf4")
    assert [type(layer) for layer in model] == [NF4Linear, nn.ReLU, NF4Linear]
    assert list(model.state_dict()) == [k.replace("base_layer.", "") for k in base_keys(merged)]
    assert torch.isfinite(model(x)).all()
    with pytest.raises(ValueError, match="no LoRALinear"):
        pylora.unmerge(model)


def base_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if "base_layer" in key]


def test_a_single_layer_merged_for_good_cannot_be_unmerged() -> None:
    layer = LoRALinear(nn.Linear(8, 8), r=2)
    nn.init.normal_(layer.lora_B)
    pylora.merge(layer, keep_base=False)
    with pytest.raises(ValueError, match="keep_base=False"):
        pylora.unmerge(layer)
    assert layer.merged and not layer.can_unmerge


@pytest.mark.parametrize("base_format", BASES)
def test_a_merged_layer_is_evaluated_but_not_trained(base_format: str) -> None:
    model = model_of(base_format)
    x = torch.randn(3, 64, dtype=torch.bfloat16 if base_format == "bf16" else torch.float32)
    pylora.merge(model)
    with torch.no_grad():
        expected = model(x)
    y = model(x)
    assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match=r"pylora\.unmerge"):
        y.sum().backward()
    model.eval()
    assert torch.equal(model(x), expected)
    model(x.requires_grad_()).sum().backward()  # gradients of the input are right in eval mode
    assert x.grad is not None and x.grad.abs().sum() > 0
    pylora.unmerge(model.train())
    model(x).sum().backward()
    assert model[0].lora_B.grad.abs().sum() > 0


def test_weights_on_the_meta_device_are_not_merged() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    pylora.add_lora(model, r=2)
    with pytest.raises(ValueError, match="0 has weights on the meta device"):
        pylora.merge(model)


def test_tied_weights_are_not_written_to() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, 64), "head": nn.Linear(64, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    pylora.add_lora(model, r=2, target_modules=["head"])
    nn.init.normal_(model["head"].lora_B)
    embedding = model["embed"].weight.detach().clone()
    pylora.merge(model)
    assert torch.equal(model["embed"].weight, embedding)
    assert not torch.equal(model["head"].weight, embedding)
    pylora.unmerge(model)
    assert model["head"].base_layer.weight is model["embed"].weight


@pytest.mark.parametrize("base_format", BASES)
@pytest.mark.parametrize("attribute", ["lora_A", "lora_B", "lora_B_bias"])
def test_a_failure_half_way_undoes_everything(base_format: str, attribute: str) -> None:
    model = model_of(base_format, lora_bias=True)
    with torch.no_grad():
        getattr(model[2], attribute).view(-1)[0] = float("nan")
    before = base_state(model[0])
    weight = model[2].base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"^2: .*finite"):
        pylora.merge(model)
    assert not model[0].merged and not model[2].merged
    assert_state(model[0], before)
    assert torch.equal(model[2].base_layer.weight, weight)


def test_overflow_of_a_half_precision_base_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8).half())
    pylora.add_lora(model, r=2)
    nn.init.constant_(model[0].lora_B, 1e6)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"too large for torch.float16"):
        pylora.merge(model)
    assert torch.equal(model[0].weight, before) and not model[0].merged


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="no LoRALinear"):
        pylora.merge(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no LoRALinear"):
        pylora.unmerge(nn.Linear(4, 4))
    model = model_of("dense")
    with pytest.raises(ValueError, match="0 is not merged"):
        pylora.unmerge(model)
    pylora.merge(model)
    state = base_state(model)
    with pytest.raises(ValueError, match="0 is merged already"):
        pylora.merge(model)
    assert_state(model, state)


def test_a_copy_unmerges_on_its_own() -> None:
    model = model_of("nf4")
    before = base_state(model)
    pylora.merge(model)
    twin = copy.deepcopy(model)
    pylora.unmerge(twin)
    assert_state(twin, before)
    assert model[0].merged
    pylora.unmerge(model)
    assert_state(model, before)


def test_a_cast_while_merged_is_followed() -> None:
    model = model_of("dense")
    expected = model[0].weight.detach().bfloat16()
    pylora.merge(model)
    model.bfloat16()
    pylora.unmerge(model)
    assert torch.equal(model[0].weight, expected)


def test_a_single_layer_can_be_merged() -> None:
    layer = LoRALinear(nn.Linear(8, 8), r=2)
    nn.init.normal_(layer.lora_B)
    assert repr(pylora.merge(layer)).count("(the model)") == 1
    pylora.unmerge(layer)


def test_autocast_does_not_round_a_merge() -> None:
    model = model_of("dense")
    twin = copy.deepcopy(model)
    pylora.merge(twin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pylora.merge(model)
    assert_state(model, base_state(twin))


def test_kept_originals_are_no_parameters() -> None:
    model = model_of("nf4")
    names = {name for name, _ in model.named_parameters()}
    pylora.merge(model)
    assert {name for name, _ in model.named_parameters()} == names
