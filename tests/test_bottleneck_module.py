"""`pylora.nn.BottleneckAdapter`: its parameters, its start, copies and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import pylora.functional as F
from pylora.functional import Norm
from pylora.nn import BottleneckAdapter

BF16, FP32 = torch.bfloat16, torch.float32


def test_it_calls_the_function_with_its_parameters(backend: str, device: str) -> None:
    adapter = BottleneckAdapter(
        48, 12, "gelu", 0.5, 0.1, "layer_norm", "rms_norm", device=device
    ).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    x, residual = torch.randn(2, 5, 48, device=device), torch.randn(2, 5, 48, device=device)
    p = dict(adapter.named_parameters())
    norms = {
        "norm_before": Norm("layer_norm", p["norm_before_weight"], p["norm_before_bias"]),
        "norm_after": Norm("rms_norm", p["norm_after_weight"]),
    }
    weights = [p[name] for name in ("down_weight", "down_bias", "up_weight", "up_bias")]
    expected = F.bottleneck_adapter(x, *weights, "gelu", 0.5, residual, **norms)
    assert torch.equal(adapter(x, residual), expected)
    expected = F.bottleneck_adapter(x, *weights, "gelu", 0.5, add_residual=False, **norms)
    assert torch.equal(adapter(x, add_residual=False), expected)
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))
    adapter(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("init_weights", ["houlsby", "bert", "mam_adapter"])
def test_it_starts_near_the_identity(init_weights: str) -> None:
    adapter = BottleneckAdapter(64, 16, init_weights=init_weights)
    x = torch.randn(8, 64)
    moved = (adapter(x) - x).detach().abs().max()
    largest = {"houlsby": 0.05, "bert": 0.2, "mam_adapter": 0.0}[init_weights]
    assert float(moved) <= largest
    assert not adapter.down_bias.any() and not adapter.up_bias.any()
    assert adapter.down_weight.any()


def test_it_equals_the_modules_of_the_adapters_library() -> None:
    """The layout of adapters.methods.modeling.Adapter, whose tensors get our names."""
    down = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 6), nn.SiLU())
    theirs = nn.ModuleDict(
        {
            "adapter_down": down,
            "adapter_up": nn.Linear(6, 24),
            "adapter_norm_after": nn.LayerNorm(24),
        }
    )
    x, residual = torch.randn(7, 24), torch.randn(7, 24)
    up = theirs["adapter_up"](down(x)) * 2.0
    expected = theirs["adapter_norm_after"](up) + residual
    names = {
        "adapter_down.0": "norm_before",
        "adapter_down.1": "down",
        "adapter_up": "up",
        "adapter_norm_after": "norm_after",
    }
    state = {}
    for key, value in theirs.state_dict().items():
        owner, kind = key.rsplit(".", 1)
        state[f"{names[owner]}_{kind}"] = value
    adapter = BottleneckAdapter(24, 6, "swish", 2.0, 0.0, "layer_norm", "layer_norm")
    adapter.load_state_dict(state)
    torch.testing.assert_close(adapter(x, residual), expected)


def test_it_survives_copies_and_other_dtypes() -> None:
    adapter = BottleneckAdapter(24, 6, bias=False, dtype=BF16)
    assert list(adapter.state_dict()) == ["down_weight", "up_weight"]
    twin = copy.deepcopy(adapter)
    x = torch.randn(3, 24)
    assert torch.equal(twin(x), adapter(x)) and adapter(x).dtype == FP32
    assert torch.equal(twin.float()(x), adapter(x))
    assert "24, 6" in repr(adapter) and "bias=False" in repr(adapter)
    assert BottleneckAdapter(24, 6, device="meta").up_weight.is_meta


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size is 0; it must be an integer >= 1"),
        ({"bottleneck_size": 2.5}, ValueError, "bottleneck_size is 2.5; it must be an integer"),
        ({"activation": "softmax"}, ValueError, "activation is 'softmax'"),
        ({"dropout": 1.5}, ValueError, "dropout is 1.5; it must be in"),
        (
            {"norm_before": "batch"},
            ValueError,
            "norm_before is 'batch'; it must be None or one",
        ),
        ({"init_weights": "zeros"}, ValueError, "init_weights is 'zeros'; it must be one of"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_errors_name_the_argument(changed: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        BottleneckAdapter(**{"hidden_size": 24, "bottleneck_size": 6} | changed)
