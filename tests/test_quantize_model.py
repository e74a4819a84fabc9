"""quantize_model: what becomes NF4 and what must not, shared weights, errors before changes."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora.nn import NF4Linear


class TinyModel(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 64, dtype=dtype)
        self.up = nn.Linear(64, 96, dtype=dtype)
        self.down = nn.Linear(96, 64, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(64, 11, bias=False, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.down(torch.relu(self.up(x))))


def class_names(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def snapshot(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor], dict[str, bool]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return class_names(model), state, {n: p.requires_grad for n, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = snapshot(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert list(after[1]) == list(before[1])
    for key, value in before[1].items():
        assert torch.equal(after[1][key].nan_to_num(7.0), value.nan_to_num(7.0)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantizes_every_linear_layer_but_the_head(dtype: torch.dtype, double_quant: bool) -> None:
    model = TinyModel(dtype).eval()
    expected = {
        name: pylora.quantize_nf4(getattr(model, name).weight, 32, double_quant)
        for name in ("up", "down")
    }
    bias = model.up.bias
    result = pylora.quantize_model(model, blocksize=32, double_quant=double_quant)
    assert result is model
    assert class_names(model)["lm_head"] == "Linear" and class_names(model)["embed"] == "Embedding"
    for name, w in expected.items():
        layer = getattr(model, name)
        assert isinstance(layer, NF4Linear) and not layer.training
        assert torch.equal(layer.weight, w.qweight) and torch.equal(layer.absmax, w.absmax)
        assert layer.nf4_weight.dtype == dtype
    assert model.up.bias is bias
    assert model(torch.tensor([[1, 2]])).isfinite().all()


@pytest.mark.parametrize(
    "skip, dense",
    [
        (("down",), {"layers.0.down", "layers.1.down"}),
        (("layers.1.down",), {"layers.1.down"}),
        (("layers.0",), {"layers.0.up", "layers.0.down", "layers.0.lm_head"}),
        ("up", {"layers.0.up", "layers.1.up"}),
        (("own",), set()),
        ((), set()),
    ],
)
def test_skips_modules_by_name_or_last_components(skip: tuple[str, ...], dense: set[str]) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([TinyModel(), TinyModel()])})
    pylora.quantize_model(model, skip_modules=skip)
    assert {
        name for name, class_name in class_names(model).items() if class_name == "Linear"
    } == dense


def test_a_head_tied_to_the_embeddings_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = TinyModel()
    model.lm_head.weight = model.embed.weight
    with caplog.at_level(logging.INFO, "pylora"):
        pylora.quantize_model(model, skip_modules=())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    assert "lm_head stays dense: it shares its weight with embed" in caplog.text
    assert "quantized 2 layers to NF4" in caplog.text


def test_a_weight_tied_to_a_skipped_layer_stays_dense() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["a"].weight = model["b"].weight
    pylora.quantize_model(model, skip_modules=("b",))
    assert class_names(model) == {"": "ModuleDict", "a": "Linear", "b": "Linear", "c": "NF4Linear"}


def test_layers_that_share_a_weight_share_its_bytes() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["a"].weight = model["b"].weight
    biases = [model["a"].bias, model["b"].bias]
    pylora.quantize_model(model)
    assert [model["a"].bias, model["b"].bias] == biases
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        assert twin["a"].weight is twin["b"].weight
        assert twin["a"].absmax_bytes is twin["b"].absmax_bytes
        assert sum(p.nbytes for p in twin.parameters()) == (
            64 * 64 // 2 + 4 * 64 + 2 * 64 * twin["a"].bias.itemsize
        )


def test_a_layer_at_two_places_is_one_layer() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared})
    pylora.quantize_model(model)
    assert isinstance(model["a"], NF4Linear) and model["a"] is model["b"]


def test_subclasses_stay_dense(caplog: pytest.LogCaptureFixture) -> None:
    """A subclass may use its weight differently. MultiheadAttention reads it directly."""
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(64, 2, batch_first=True), "up": nn.Linear(64, 64)}
    )
    pylora.quantize_model(model)
    assert class_names(model)["up"] == "NF4Linear"
    assert "attention.out_proj stays dense" in caplog.text
    x = torch.randn(1, 3, 64)
    assert model["attention"](x, x, x)[0].shape == x.shape


def test_modules_that_must_be_float32_stay_dense() -> None:
    model = TinyModel()
    model._keep_in_fp32_modules = ["down"]
    pylora.quantize_model(model)
    assert class_names(model)["down"] == "Linear" and class_names(model)["up"] == "NF4Linear"


def test_hooks_are_kept() -> None:
    model = TinyModel()
    seen = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    pylora.quantize_model(model)
    model(torch.tensor([[1]]))
    assert seen == [NF4Linear]


def test_each_dense_weight_is_freed_before_the_next_is_quantized() -> None:
    model = TinyModel()
    weights = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    alive: list[int] = []

    original = pylora.functional.quantize_nf4

    def counting(*args: object, **kwargs: object) -> object:
        alive.append(sum(weight() is not None for weight in weights))
        return original(*args, **kwargs)

    pylora.functional.quantize_nf4 = counting
    try:
        pylora.quantize_model(model)
    finally:
        pylora.functional.quantize_nf4 = original
    gc.collect()
    assert alive == [2, 1]
    assert all(weight() is None for weight in weights)


def test_meta_model_is_quantized_when_its_checkpoint_loads() -> None:
    source = TinyModel(torch.bfloat16)
    with torch.device("meta"):
        model = TinyModel(torch.bfloat16)
    pylora.quantize_model(model, double_quant=True)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    expected = pylora.quantize_model(source, double_quant=True)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_takes_over_bitsandbytes_layers() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = TinyModel()
    model.up = bnb.nn.Linear4bit(64, 96, quant_type="nf4").to("cpu").train()
    pointer = model.up.weight.data_ptr()
    pylora.quantize_model(model)
    assert isinstance(model.up, NF4Linear) and model.up.weight.data_ptr() == pointer
    assert model.up.double_quant and not model.down.double_quant


def test_fp4_layers_are_refused_by_name() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = TinyModel()
    model.down = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="fp4").to("cpu").train()
    before = class_names(model)
    with pytest.raises(ValueError, match=r"down: .*'fp4'; it must be 'nf4'"):
        pylora.quantize_model(model)
    assert class_names(model) == before


def test_non_finite_weight_is_named_and_nothing_changes() -> None:
    model = TinyModel()
    with torch.no_grad():
        model.down.weight[3, 5] = float("inf")
    before = snapshot(model)
    message = r"down.weight has 1 non-finite element, the first at index \(3, 5\)"
    with pytest.raises(ValueError, match=message):
        pylora.quantize_model(model)
    assert_unchanged(model, before)


def test_unsuitable_dtype_is_named_and_nothing_changes() -> None:
    model = TinyModel()
    model.down.double()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"down.weight has dtype torch.float64"):
        pylora.quantize_model(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: pylora.quantize_model(m, blocksize=100), "blocksize is 100"),
        (lambda m: pylora.quantize_model(m.up), "model is an nn.Linear itself"),
        (lambda m: pylora.quantize_model(m.embed), "no layer to quantize"),
        (lambda m: pylora.quantize_model(m, ("up", "down", "lm_head")), "no layer to quantize"),
        (lambda m: pylora.quantize_model(pylora.add_lora(m, r=2)), "before pylora.add_lora"),
    ],
)
def test_bad_calls_are_refused(change: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(TinyModel())  # type: ignore[operator]


def test_a_second_call_does_nothing() -> None:
    model = pylora.quantize_model(TinyModel())
    layer = model.up
    assert pylora.quantize_model(model).up is layer


def test_a_quantized_llama_generates() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    dense_bytes = sum(p.nbytes for p in model.model.layers.parameters())
    pylora.quantize_model(model, double_quant=True)
    assert sum(p.nbytes for p in model.model.layers.parameters()) < dense_bytes / 5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert out.shape == (1, 6)
