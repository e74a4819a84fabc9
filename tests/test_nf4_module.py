"""NF4Linear: its state dict, bitsandbytes' entries, casts, dense checkpoints, load errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import NF4Linear
from pylora.testing import assert_as_accurate_as_torch

bnb = pytest.importorskip("bitsandbytes")
SHAPES = [
    (128, 64),
    (96, 40),
    (7, 33),
]  # whole blocks in each row; blocks that straddle rows; an odd number of elements


def bnb_linear(out_features: int, in_features: int, double_quant: bool = True) -> nn.Module:
    dense = nn.Linear(in_features, out_features)
    layer = bnb.nn.Linear4bit(
        in_features, out_features, quant_type="nf4", compress_statistics=double_quant
    )
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu").train()  # .to() quantizes, and eval mode would repack the bytes


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoint_entries_are_those_of_bitsandbytes(
    shape: tuple[int, int], double_quant: bool
) -> None:
    theirs = bnb_linear(*shape, double_quant)
    ours = NF4Linear(shape[1], shape[0], double_quant=double_quant)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.state_dict()
    actual = ours.checkpoint_entries()
    assert sorted(actual) == sorted(expected)
    for key, value in expected.items():
        assert actual[key].shape == value.shape and torch.equal(actual[key], value), key
    x = torch.randn(5, shape[1])
    weight = ours.nf4_weight.dequantize()
    assert_as_accurate_as_torch(ours(x), nn.functional.linear, x, weight, ours.bias.detach())


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_loads_what_is_saved_here(double_quant: bool) -> None:
    ours = NF4Linear(64, 128, double_quant=double_quant)
    theirs = bnb_linear(128, 64, double_quant)
    prefixed = {f"layer.{key}": value for key, value in ours.checkpoint_entries().items()}
    state = {k.removeprefix("layer."): v for k, v in prefixed.items() if k.startswith("layer.")}
    param = bnb.nn.Params4bit.from_prequantized(
        state.pop("weight"),
        {k: v for k, v in state.items() if k.startswith("weight.")},
        device="cpu",
    )
    theirs.weight = param
    theirs.bias.data = state["bias"]
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.checkpoint_entries()[key]), key
    dense = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    assert torch.equal(dense, ours.nf4_weight.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_from_bitsandbytes_shares_bytes(double_quant: bool) -> None:
    theirs = bnb_linear(128, 64, double_quant)
    ours = NF4Linear.from_bitsandbytes(theirs)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    assert ours.absmax.data_ptr() == theirs.weight.quant_state.absmax.data_ptr()
    assert ours.bias is theirs.bias
    assert ours.double_quant == double_quant and ours.blocksize == 64
    back = ours.nf4_weight.to_bitsandbytes()
    assert back.data_ptr() == theirs.weight.data_ptr()


def test_repacked_bitsandbytes_layer_is_refused() -> None:
    theirs = bnb_linear(128, 64)
    theirs.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked in place"):
        NF4Linear.from_bitsandbytes(theirs)


def test_fp4_is_refused() -> None:
    layer = bnb.nn.Linear4bit(64, 64, quant_type="fp4").to("cpu")
    with pytest.raises(ValueError, match="quant_type 'fp4'; it must be 'nf4'"):
        NF4Linear.from_bitsandbytes(layer)


def test_another_blocksize_and_bf16_storage_can_be_loaded() -> None:
    source = NF4Linear(256, 32, blocksize=128, double_quant=True, dtype=torch.bfloat16)
    state = source.checkpoint_entries()
    state["weight"] = state["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    target = NF4Linear(256, 32)
    target.load_state_dict(state)
    assert target.blocksize == 128 and target.double_quant
    assert target.nf4_weight.dtype == torch.bfloat16
    assert torch.equal(target.nf4_weight.dequantize(), source.nf4_weight.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_casts_leave_the_weight_alone(double_quant: bool) -> None:
    layer = NF4Linear(64, 32, double_quant=double_quant)
    before = layer.nf4_weight.dequantize(torch.float64)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(layer)
        assert torch.equal(layer.nf4_weight.dequantize(torch.float64), before)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.uint8
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    weight = before.to(torch.bfloat16)
    assert_as_accurate_as_torch(layer(x), nn.functional.linear, x, weight, layer.bias.detach())


def test_deepcopy_is_independent() -> None:
    layer = NF4Linear(64, 32, double_quant=True)
    twin = copy.deepcopy(layer)
    assert_same(stored(twin), stored(layer))
    before = stored(layer)
    with torch.no_grad():
        twin.weight.zero_()
        twin.nested_bytes.zero_()
        twin.bias.zero_()
    assert_same(stored(layer), before)


def test_nothing_but_the_bias_is_trainable() -> None:
    layer = NF4Linear(64, 32, double_quant=True)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer(torch.randn(2, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 2.0))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_on_meta_can_be_loaded(double_quant: bool) -> None:
    source = NF4Linear(64, 32, double_quant=double_quant)
    layer = NF4Linear(64, 32, double_quant=double_quant, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.load_state_dict(stored(source))
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert_same(stored(layer), stored(source))
    moved = NF4Linear(64, 32, double_quant=double_quant, device="meta").to_empty(device="cpu")
    moved.load_state_dict(stored(source))
    assert_same(stored(moved), stored(source))


def test_safetensors_restore_every_tensor(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.ModuleDict(
        {"a": NF4Linear(64, 32, double_quant=True), "b": NF4Linear(40, 7, False, 32)}
    )
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin = nn.ModuleDict(
        {"a": NF4Linear(64, 32, double_quant=True), "b": NF4Linear(40, 7, False, 32)}
    )
    twin.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert_same(stored(twin), stored(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_checkpoint_is_quantized_on_load(dtype: torch.dtype) -> None:
    dense = nn.Linear(64, 32, dtype=dtype)
    layer = NF4Linear(64, 32, blocksize=32, double_quant=True, dtype=dtype)
    layer.load_state_dict(dense.state_dict())
    expected = pylora.quantize_nf4(dense.weight, blocksize=32, double_quant=True)
    assert torch.equal(layer.weight, expected.qweight)
    assert torch.equal(layer.absmax, expected.absmax)
    assert torch.equal(layer.bias, dense.bias)


def test_loaded_layer_does_not_share_with_the_state_dict() -> None:
    source = NF4Linear(64, 32, double_quant=True)
    layer = NF4Linear(64, 32, double_quant=True)
    layer.load_state_dict(source.state_dict())
    before = stored(layer)
    with torch.no_grad():
        for tensor in (*source.parameters(), *source.buffers()):
            tensor.zero_()
    assert_same(stored(layer), before)


def damaged(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "absmax gone":
        del state["weight.absmax"]
    elif how == "blob gone":
        del state["weight.quant_state.bitsandbytes__nf4"]
    elif how == "blob unreadable":
        state["weight.quant_state.bitsandbytes__nf4"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    elif how == "map gone":
        del state["weight.nested_quant_map"]
    elif how == "nested absmax gone":
        del state["weight.nested_absmax"]
    elif how == "all nested gone":
        del state["weight.nested_absmax"], state["weight.nested_quant_map"]
    elif how == "blob of plain absmax":
        plain = NF4Linear(64, 32).checkpoint_entries()
        state["weight.quant_state.bitsandbytes__nf4"] = plain[
            "weight.quant_state.bitsandbytes__nf4"
        ]
    elif how == "plain absmax":
        state["weight.absmax"] = state["weight.absmax"].float()
    elif how == "another code":
        state["weight.quant_map"] = state["weight.quant_map"] * 2
    elif how == "short weight":
        state["weight"] = state["weight"][:-1]
    elif how == "short absmax":
        state["weight.absmax"] = state["weight.absmax"][:-1]
    elif how == "other shape":
        state.update(NF4Linear(128, 32, double_quant=True).checkpoint_entries())
        state["bias"] = torch.zeros(32)
    elif how == "bias of another size":
        state["bias"] = torch.zeros(31)
    elif how == "non-finite dense weight":
        for key in [k for k in state if k.startswith("weight.")]:
            del state[key]
        state["weight"] = torch.full((32, 64), float("nan"))
    return state


@pytest.mark.parametrize(
    "how, message",
    [
        ("absmax gone", "Missing key.*proj.weight.absmax"),
        ("blob gone", "Missing key.*proj.weight.quant_state.bitsandbytes__nf4"),
        ("blob unreadable", "proj: .*not a readable NF4 description"),
        ("map gone", "Missing key.*proj.weight.nested_quant_map"),
        ("nested absmax gone", "Missing key.*proj.weight.nested_absmax"),
        ("all nested gone", "Missing key.*proj.weight.nested_absmax"),
        ("blob of plain absmax", "proj: .* has no nested_offset"),
        (
            "plain absmax",
            "proj: .*absmax has dtype torch.float32; double-quantized it must be uint8",
        ),
        ("another code", "proj: .*quant_map is not the NF4 code"),
        ("short weight", "proj: .*holds 1023 bytes"),
        ("short absmax", "proj: .*absmax has 31 elements; it must have 32"),
        ("other shape", r"proj: .*shape \(32, 128\); it must be \(32, 64\)"),
        ("bias of another size", r"proj: .*bias has shape \(31,\); it must be \(32,\)"),
        ("non-finite dense weight", "proj: .*2048 non-finite elements"),
    ],
)
def test_load_errors_change_nothing(how: str, message: str) -> None:
    model = nn.ModuleDict({"proj": NF4Linear(64, 32, double_quant=True)})
    before = stored(model)
    state = damaged(NF4Linear(64, 32, double_quant=True).checkpoint_entries(), how)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"proj.{key}": value for key, value in state.items()})
    after = stored(model)
    if message.startswith("Missing key"):  # torch loads the keys that it finds
        del before["proj.bias"], after["proj.bias"]
    assert_same(after, before)


def test_missing_and_unexpected_keys_are_named() -> None:
    layer = NF4Linear(64, 32)
    state = NF4Linear(64, 32, bias=False).state_dict()
    state["weight.zero_point"] = torch.zeros(1)
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["bias"]
    with pytest.raises(RuntimeError, match=r"zero_point"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_features": -1, "out_features": 2}, "in_features is -1"),
        ({"in_features": 4, "out_features": 2.5}, "out_features is 2.5"),
        ({"in_features": 4, "out_features": 2, "blocksize": 48}, "blocksize is 48"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NF4Linear(**arguments)


def test_from_linear_takes_only_dense_layers() -> None:
    with pytest.raises(TypeError, match="linear is Conv1d"):
        NF4Linear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match=r"dense nn.Linear"):
        NF4Linear.from_linear(bnb_linear(64, 64))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.to(torch.int16), "weight has dtype torch.int16"),
        (lambda t: t > 7, "weight has dtype torch.bool"),
        (lambda t: t.to(torch.float16), "holds 1024 bytes in torch.float16"),
        (lambda t: t[:-1], "holds 511 bytes"),
        (lambda t: torch.cat([t, t[:1]]), "holds 513 bytes"),
    ],
)
def test_wrong_packed_bytes_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    layer = NF4Linear(64, 16, bias=False)
    before, state = layer.weight.clone(), layer.checkpoint_entries()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state | {"weight": change(state["weight"])})
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_packed_bytes_may_have_any_storage_dtype_of_bitsandbytes(storage: torch.dtype) -> None:
    layer, loaded = NF4Linear(64, 16, bias=False), NF4Linear(64, 16, bias=False)
    state = layer.checkpoint_entries()
    loaded.load_state_dict(state | {"weight": state["weight"].view(-1).view(storage).view(-1, 1)})
    assert torch.equal(loaded.weight, layer.weight)


@pytest.mark.parametrize(
    "facts",
    [
        {"blocksize": 0},
        {"blocksize": 48},
        {"nested_blocksize": 0},
        {"shape": [-16, 64]},
        {"dtype": "uint8"},
        {"dtype": "nn"},
        {"nested_offset": "much"},
    ],
    ids=str,
)
def test_wrong_descriptions_are_refused(facts: dict[str, Any]) -> None:
    layer = NF4Linear(64, 16, double_quant=True)
    state, key = layer.checkpoint_entries(), "weight.quant_state.bitsandbytes__nf4"
    blob = json.dumps(json.loads(bytes(state[key].tolist())) | facts).encode()
    with pytest.raises(RuntimeError, match="NF4Linear: "):
        layer.load_state_dict(state | {key: torch.tensor(list(blob), dtype=torch.uint8)})
