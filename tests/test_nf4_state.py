"""The state of an NF4Linear: no cast reaches it, and loading copies in place."""

from __future__ import annotations

import copy
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import pylora
from pylora.nn import LoRALinear, NF4Linear

FORMS = [(96, 48, False), (96, 48, True), (33, 70, True)]  # the last has blocks that straddle rows


def nf4_layer(out_features: int, in_features: int, double_quant: bool) -> NF4Linear:
    return NF4Linear(in_features, out_features, blocksize=32, double_quant=double_quant)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_loop_that_casts_every_tensor_leaves_the_weight_alone(form: tuple) -> None:
    layer = nf4_layer(*form)
    before, x = layer.nf4_weight.dequantize(), torch.randn(5, form[1])
    layer(x)  # the forward after the cast must not use what this one kept
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.nf4_weight.dequantize(), before)
    layer(x.bfloat16())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_memory_that_was_exchanged_under_a_parameter_is_seen(form: tuple) -> None:
    """ZeRO-3 does this: the parameter stays the same object and gets other memory."""
    layer, other = nf4_layer(*form), nf4_layer(*form)
    x = torch.randn(3, form[1])
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        layer.bias.copy_(other.bias)
        for name in ("weight", "absmax_bytes", "nested_bytes"):
            if getattr(layer, name) is not None:
                getattr(layer, name).data = getattr(other, name).clone()
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_key_of_the_state_dict_is_an_attribute(form: tuple) -> None:
    layer = nf4_layer(*form)
    model = nn.ModuleList([layer])
    for key, value in model.state_dict().items():
        assert attrgetter(key)(model).data_ptr() == value.data_ptr(), key
    for name, parameter in layer.named_parameters():
        if name != "bias":
            assert parameter.dtype == torch.uint8 and not parameter.requires_grad


@pytest.mark.parametrize("as_checkpoint", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loading_copies_into_the_tensors_that_are_there(form: tuple, as_checkpoint: bool) -> None:
    source, layer = nf4_layer(*form), nf4_layer(*form)
    x = torch.randn(3, form[1])
    layer(x)
    held = dict(layer.named_parameters()) | dict(layer.named_buffers())
    addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
    layer.load_state_dict(source.checkpoint_entries() if as_checkpoint else source.state_dict())
    for name, tensor in held.items():
        assert getattr(layer, name) is tensor and tensor.data_ptr() == addresses[name], name
    assert torch.equal(layer(x), source(x))


def test_tied_layers_stay_tied_when_another_format_is_loaded() -> None:
    model = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
    model[0].weight = model[1].weight
    pylora.quantize_model(model)
    source = NF4Linear(64, 64, bias=False, blocksize=128, double_quant=True)
    entries = source.checkpoint_entries()
    model.load_state_dict({f"{i}.{key}": v for i in (0, 1) for key, v in entries.items()})
    assert model[0].weight is model[1].weight
    assert model[0].absmax_bytes is model[1].absmax_bytes
    x = torch.randn(2, 64)
    for layer in model:
        assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bitsandbytes_entries_may_come_one_by_one(form: tuple) -> None:
    source, layer = nf4_layer(*form), nf4_layer(*form)
    x, before = torch.randn(3, form[1]), snapshot(layer)
    *first, last = sorted(source.checkpoint_entries().items(), key=lambda item: "state" in item[0])
    for key, entry in first:
        result = layer.load_state_dict({key: entry}, strict=False)
        assert not result.unexpected_keys
        if key != "bias":
            assert result.missing_keys
    del before["bias"]
    assert_same({key: layer.state_dict()[key] for key in before}, before)
    layer.load_state_dict(dict([last]), strict=False)
    assert_same(snapshot(layer), snapshot(source))
    assert torch.equal(layer(x), source(x))


def test_a_bias_is_loaded_beside_a_part_of_the_weight() -> None:
    source, layer = nf4_layer(96, 48, True), nf4_layer(96, 48, True)
    entries = source.checkpoint_entries()
    first = {key: entries.pop(key) for key in ("weight", "bias")}
    layer.load_state_dict(first, strict=False)
    assert torch.equal(layer.bias, source.bias) and not torch.equal(layer.weight, source.weight)
    layer.load_state_dict(entries, strict=False)
    assert_same(snapshot(layer), snapshot(source))


@pytest.mark.parametrize("name", ["weight", "absmax_bytes", "nested_bytes"])
def test_bytes_in_another_dtype_are_refused(name: str) -> None:
    layer = nf4_layer(32, 64, True)
    before, state = snapshot(layer), snapshot(nf4_layer(32, 64, True))
    with pytest.raises(RuntimeError, match=f"{name} has dtype torch.float16; it must be uint8"):
        layer.load_state_dict(state | {name: state[name].half()})
    assert_same(snapshot(layer), before)


def test_a_lone_layer_refuses_the_state_of_another_format() -> None:
    state = NF4Linear(32, 16, blocksize=4096).state_dict()
    layer = NF4Linear(32, 16, blocksize=2048)  # both have one block, and so the same shapes
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="the weight has blocksize 4096; it must be 2048"):
        layer.load_state_dict(state)
    assert_same(snapshot(layer), before)


@pytest.mark.parametrize("average", ["ema", "swa", "swa of many"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_models_has_the_bytes_of_the_model(average: str, use_buffers: bool) -> None:
    functions = {"ema": get_ema_multi_avg_fn(0.9), "swa of many": get_swa_multi_avg_fn()}
    model = nn.Sequential(nn.Linear(70, 64), nn.ReLU(), nn.Linear(64, 33))
    pylora.quantize_model(model, blocksize=32, double_quant=True)
    pylora.add_lora(model, r=2)
    averaged = AveragedModel(model, multi_avg_fn=functions.get(average), use_buffers=use_buffers)
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].lora_A.add_(1)
    averaged.update_parameters(model)
    assert int(averaged.n_averaged) == 2
    share = 0.1 if average == "ema" else 0.5
    torch.testing.assert_close(averaged.module[0].lora_A, model[0].lora_A - (1 - share))
    for ours, theirs in zip(averaged.module, model, strict=True):
        if isinstance(theirs, LoRALinear):
            assert_same(snapshot(ours.base_layer), snapshot(theirs.base_layer))


def lora_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 48), NF4Linear(48, 32, double_quant=True))
    pylora.add_lora(model, r=4, lora_bias=True)
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.2)
        nn.init.normal_(layer.lora_B_bias, std=0.2)
    return model


def test_a_state_dict_taken_while_merged_is_that_of_the_unmerged_model() -> None:
    model, x = lora_model(), torch.randn(3, 64)
    before, expected = snapshot(model), model(x)
    pylora.merge(model)
    assert_same(snapshot(model), before)
    other = lora_model()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


def test_loading_a_state_dict_unmerges(caplog: pytest.LogCaptureFixture) -> None:
    source, model, x = lora_model(), lora_model(), torch.randn(3, 64)
    pylora.merge(model)
    model.load_state_dict(source.state_dict())
    assert "0 was merged; it is unmerged now" in caplog.text
    assert torch.equal(model(x), source(x))


def test_layers_merged_for_good_have_no_lora_in_their_state_dict() -> None:
    model, x = lora_model(), torch.randn(3, 64)
    unmerged = snapshot(model)
    twin = copy.deepcopy(model)
    for merged in (model, twin):
        pylora.merge(merged, keep_base=False)
    state = snapshot(model)
    assert not any("lora_" in key for key in state)
    with pytest.raises(RuntimeError, match="lora_A"):
        lora_model().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.lora_A"):
        model.load_state_dict(unmerged)
    assert_same(snapshot(model), state)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), model(x))


def test_a_single_layer_merged_for_good_takes_no_lora() -> None:
    layer = LoRALinear(NF4Linear(64, 32), r=2)
    unmerged = snapshot(layer)
    torch.nn.init.normal_(layer.lora_B)
    pylora.merge(layer, keep_base=False)
    state = snapshot(layer)
    assert not any("lora_" in key for key in state)
    with pytest.raises(RuntimeError, match=r"lora_A is of an unmerged layer"):
        layer.load_state_dict(unmerged)
    assert_same(snapshot(layer), state)


def test_distributed_checkpoints_know_the_keys(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, model, x = lora_model(), lora_model(), torch.randn(3, 64)
    dcp.save(get_model_state_dict(source), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(model, state)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_accelerate_loads_files_that_split_a_layer(tmp_path: Path, shard_size: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    source, model, x = lora_model(), lora_model(), torch.randn(3, 64)
    accelerate.Accelerator(cpu=True).save_model(source, tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_size == "1GB"
    accelerate.load_checkpoint_in_model(model, tmp_path)
    assert torch.equal(model(x), source(x))
