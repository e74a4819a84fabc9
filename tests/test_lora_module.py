"""LoRALinear: its output and gradients are those of PEFT's layers over dense and NF4 bases."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import pylora
from pylora.nn import LoRALinear, NF4Linear
from pylora.testing import assert_as_accurate_as_torch

peft = pytest.importorskip("peft")

IN, OUT = 96, 80
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
}
BASES = ["dense", "nf4", "nf4-double"]


def base_layer(
    base_format: str, dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.Module:
    dense = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    if base_format == "dense":
        return dense
    return NF4Linear.from_linear(dense, blocksize=32, double_quant=base_format == "nf4-double")


def trained(layer: LoRALinear) -> LoRALinear:
    """Moves every LoRA parameter away from its initial value, as training does."""
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.05)
        for parameter in (layer.lora_B_bias, layer.lora_magnitude):
            if parameter is not None:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(0.01)
    return layer


def dense_weight(layer: LoRALinear, dtype: torch.dtype) -> Tensor:
    weight = layer.base_weight
    if isinstance(weight, pylora.NF4Weight):
        return weight.dequantize(dtype)
    return weight.detach().to(dtype)


def under_peft(
    x: Tensor, weight: Tensor, parameters: dict[str, Tensor], layer: LoRALinear
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output and gradients of PEFT's LoRA over a dense base, with `layer`'s numbers."""
    dense = nn.Linear(IN, OUT, bias="bias" in parameters, device="meta")
    dense.weight = nn.Parameter(weight.clone())
    if "bias" in parameters:
        dense.bias = nn.Parameter(parameters["bias"].clone())
    config = peft.LoraConfig(
        r=layer.r,
        lora_alpha=layer.lora_alpha,
        target_modules=["0"],
        use_rslora=layer.use_rslora,
        use_dora=layer.use_dora,
        lora_bias=layer.lora_B_bias is not None,
    )
    model = peft.get_peft_model(nn.Sequential(dense), config, autocast_adapter_dtype=False)
    theirs = model.base_model.model[0]
    theirs.lora_A["default"].weight = nn.Parameter(parameters["lora_A"].clone())
    theirs.lora_B["default"].weight = nn.Parameter(parameters["lora_B"].clone())
    named = {
        "lora_A": theirs.lora_A["default"].weight,
        "lora_B": theirs.lora_B["default"].weight,
    }
    if "lora_B_bias" in parameters:
        theirs.lora_B["default"].bias = nn.Parameter(parameters["lora_B_bias"].clone())
        named["lora_B_bias"] = theirs.lora_B["default"].bias
    if "lora_magnitude" in parameters:
        magnitude = nn.Parameter(parameters["lora_magnitude"].clone())
        theirs.lora_magnitude_vector["default"].weight = magnitude
        named["lora_magnitude"] = magnitude
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y, {"x": x.grad, **{name: p.grad for name, p in named.items()}}


def ours(x: Tensor, layer: LoRALinear) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    named = {n: p.grad for n, p in layer.named_parameters() if n.startswith("lora_")}
    return y, {"x": x.grad, **named}


def parameters_of(layer: LoRALinear) -> dict[str, Tensor]:
    parameters = {n: p.detach() for n, p in layer.named_parameters() if n.startswith("lora_")}
    if layer.bias is not None:
        parameters["bias"] = layer.bias.detach()
    return parameters


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base_format", BASES)
def test_equals_peft(base_format: str, variant: str) -> None:
    layer = trained(LoRALinear(base_layer(base_format), r=5, lora_alpha=12, **VARIANTS[variant]))
    x = torch.randn(3, 7, IN)
    weight = dense_weight(layer, torch.float32)
    if base_format != "dense":  # the float64 weights are exact; float32 rounds code * absmax
        exact = dense_weight(layer, torch.float64)

        def function(x: Tensor, weight: Tensor, *rest: Any) -> Any:
            return under_peft(x, exact if x.dtype == torch.float64 else weight, *rest)
    else:
        function = under_peft
    assert_as_accurate_as_torch(ours(x, layer), function, x, weight, parameters_of(layer), layer)


@pytest.mark.parametrize("base_format", BASES)
@pytest.mark.parametrize("variant", ["plain", "bias", "dora"])
def test_lora_over_a_bf16_base_is_fp32(base_format: str, variant: str) -> None:
    """As in PEFT, LoRA parameters are float32 by default, whatever dtype the base has."""
    layer = trained(LoRALinear(base_layer(base_format, torch.bfloat16), r=4, **VARIANTS[variant]))
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(6, IN, dtype=torch.bfloat16)
    exact = dense_weight(layer, torch.float64)

    def output(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return under_peft(x, exact if x.dtype == torch.float64 else weight, *rest)[0]

    weight = dense_weight(layer, torch.bfloat16)
    assert_as_accurate_as_torch(layer(x), output, x, weight, parameters_of(layer), layer)


def test_starts_as_its_base() -> None:
    x = torch.randn(4, IN)
    for variant in VARIANTS.values():
        for base_format in BASES:
            base = base_layer(base_format)
            layer = LoRALinear(base, r=3, **variant)
            weight, bias = dense_weight(layer, x.dtype), layer.base_layer.bias
            assert_as_accurate_as_torch(layer(x), linear, x, weight, bias)


def test_scaling_follows_alpha_and_rank() -> None:
    assert LoRALinear(nn.Linear(8, 8), r=4, lora_alpha=6).scaling == 1.5
    assert LoRALinear(nn.Linear(8, 8), r=4, lora_alpha=6, use_rslora=True).scaling == 3.0
    layer = LoRALinear(nn.Linear(8, 8), r=4)
    layer.set_scaling(10, True)
    assert layer.scaling == 10 / math.sqrt(4)


def test_only_lora_is_trainable() -> None:
    for base_format in BASES:
        layer = LoRALinear(base_layer(base_format), r=4, use_dora=True)
        trainable = sorted(n for n, p in layer.named_parameters() if p.requires_grad)
        assert trainable == ["lora_A", "lora_B", "lora_magnitude"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_acts_only_in_training_and_is_right_on_average(use_dora: bool) -> None:
    layer = trained(LoRALinear(base_layer("nf4"), r=4, lora_dropout=0.5, use_dora=use_dora))
    x = torch.randn(1, IN)
    expected = layer.eval()(x).detach()
    assert torch.equal(layer(x), expected)
    layer.train()
    draws = layer(x.expand(4000, IN).contiguous()).detach()
    assert draws.std(0).max() > 0
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 5.5 * standard_error + 1e-5).all()


def test_a_first_call_with_dropout_leaves_none_in_eval_mode() -> None:
    layer = trained(LoRALinear(base_layer("nf4"), r=4, lora_dropout=0.5))
    x = torch.randn(4, IN, requires_grad=True)
    expected = copy.deepcopy(layer).eval()(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    layer.train()(x)  # the layer keeps the record of its first call
    y = layer.eval()(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected) and torch.equal(gradient, expected_gradient)


def test_dropout_leaves_the_base_alone() -> None:
    layer = LoRALinear(base_layer("nf4"), r=4, lora_dropout=0.9).train()
    x = torch.randn(5, IN)
    assert_as_accurate_as_torch(layer(x), lambda y: y * 1.0, layer.base_layer(x))  # lora_B is zero


def test_dropout_obeys_the_seed() -> None:
    layer = trained(LoRALinear(base_layer("nf4"), r=4, lora_dropout=0.3)).train()
    x = torch.randn(5, IN)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and not torch.equal(second, first)


@pytest.mark.parametrize("base_format", ["dense", "nf4-double"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_state_dict_restores_the_layer(base_format: str, use_dora: bool) -> None:
    layer = trained(LoRALinear(base_layer(base_format), r=4, use_dora=use_dora))
    twin = LoRALinear(base_layer(base_format), r=4, use_dora=use_dora)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_dora_norm_follows_a_new_base() -> None:
    """The row norms of W are kept, so they must be computed anew if a state dict replaces W."""
    layer = trained(LoRALinear(base_layer("nf4"), r=4, use_dora=True))
    other_layer = trained(LoRALinear(base_layer("nf4"), r=4, use_dora=True))
    layer.load_state_dict(other_layer.state_dict())
    exact = dense_weight(layer, torch.float64) + layer.scaling * (
        layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    )
    assert_as_accurate_as_torch(
        layer.weight_norm(),
        lambda w: torch.linalg.vector_norm(w, dim=1).float().to(w.dtype),
        exact.float(),
    )


@pytest.mark.parametrize("base_format", BASES)
def test_dora_norm_survives_casts_and_moves(base_format: str) -> None:
    layer = trained(LoRALinear(base_layer(base_format, torch.bfloat16), r=4, use_dora=True))
    before = layer.base_norm.clone()
    layer.bfloat16().float()
    assert layer.base_norm.dtype == before.dtype and torch.equal(layer.base_norm, before)
    twin = LoRALinear(base_layer(base_format, torch.bfloat16), r=4, use_dora=True).to("meta")
    assert twin.lora_A.is_meta
    twin.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(twin.base_norm, before)


@pytest.mark.parametrize("base_format", BASES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weight_is_base_plus_lora(base_format: str, use_dora: bool) -> None:
    layer = trained(LoRALinear(base_layer(base_format), r=4, use_dora=use_dora))

    def merged(weight: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        weight = weight + layer.scaling * (parameters["lora_B"] @ parameters["lora_A"])
        if use_dora:
            norm = torch.linalg.vector_norm(weight, dim=1)
            weight = weight * (parameters["lora_magnitude"] / norm)[:, None]
        return weight

    weight = dense_weight(layer, torch.float32)
    assert_as_accurate_as_torch(layer.merged_weight(), merged, weight, parameters_of(layer))


def test_takes_over_a_bitsandbytes_layer() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu").train()
    layer = LoRALinear(linear, r=4)
    assert isinstance(layer.base_layer, NF4Linear)
    assert layer.base_layer.weight.data_ptr() == linear.weight.data_ptr()


def test_has_the_attributes_of_a_linear_layer() -> None:
    base = base_layer("nf4")
    layer = LoRALinear(base, r=4)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert "r=4" in repr(layer) and "use_dora" not in repr(layer)


# Inductor fuses DoRA's rescaling and rounds once less, so its bits may differ.
@pytest.mark.parametrize(
    ("use_dora", "compiler"), [(False, "inductor"), (False, "aot_eager"), (True, "aot_eager")]
)
def test_compiles_as_one_graph(use_dora: bool, compiler: str) -> None:
    layer = trained(LoRALinear(base_layer("nf4-double"), r=4, use_dora=use_dora))
    x = torch.randn(5, IN)
    y, gradients = ours(x, layer)
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    x = x.clone().requires_grad_()
    actual = compiled(x)
    actual.square().sum().backward()
    assert torch.equal(actual, y)
    assert torch.equal(x.grad, gradients["x"])
    for name in ("lora_A", "lora_B"):
        assert torch.equal(getattr(layer, name).grad, gradients[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "bias", "dora"])
@pytest.mark.parametrize("base_format", ["dense", "nf4-double"])
def test_compiled_gradients_are_right(base_format: str, variant: str, dtype: torch.dtype) -> None:
    """All gradients are checked, also a dense base's: Inductor of torch 2.10 got some wrong."""
    torch.compiler.reset()
    base = base_layer(base_format, dtype)
    layer = trained(LoRALinear(base, r=4, dtype=dtype, **VARIANTS[variant]))
    if base_format == "dense":
        base.requires_grad_()
    grad = torch.randn(6, OUT, dtype=dtype)
    eager = dense_weight(layer, dtype)
    exact = dense_weight(layer, torch.float64)

    def gradients(run: Any, x: Tensor, grad: Tensor, module: nn.Module) -> dict[str, Tensor]:
        module.zero_grad()
        x = x.clone().requires_grad_()
        run(x).backward(grad)
        grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
        assert all(value is not None for value in grads.values())
        return {"x": x.grad, **grads}

    def plain(x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        module = copy.deepcopy(layer).to(x.dtype)
        if base_format != "dense":
            weight = exact if x.dtype == torch.float64 else eager
            module.base_layer = nn.Linear(IN, OUT, dtype=x.dtype).requires_grad_(False)
            module.base_layer.load_state_dict({"weight": weight, "bias": layer.bias})
        with pylora.use_backend("reference"):
            return gradients(module, x, grad, module)

    x = torch.randn(6, IN, dtype=dtype)
    compiled = gradients(torch.compile(layer, fullgraph=True), x, grad, layer)
    assert_as_accurate_as_torch(compiled, plain, x, grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_gives_the_accuracy_of_peft(variant: str) -> None:
    layer = trained(LoRALinear(base_layer("nf4"), r=4, **VARIANTS[variant]))
    x = torch.randn(5, IN)
    exact = dense_weight(layer, torch.float64)

    def output(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if x.dtype == torch.float64:
            return under_peft(x, exact, *rest)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return under_peft(x, weight, *rest)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(x)
        norm = layer.weight_norm() if layer.lora_magnitude is not None else None
    weight = dense_weight(layer, torch.float32)
    assert_as_accurate_as_torch(actual, output, x, weight, parameters_of(layer), layer)
    if norm is not None:
        assert torch.equal(norm, layer.weight_norm())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"r": 0}, ValueError, "r is 0; it must be an integer >= 1"),
        ({"r": 2.5}, ValueError, "r is 2.5"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout is 1.0; it must be in \[0, 1\)"),
        ({"use_dora": True, "lora_bias": True}, ValueError, "lora_bias is True"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = nn.Linear(8, 8)
    with pytest.raises(error, match=message):
        LoRALinear(base, **arguments)
    assert base.weight.requires_grad


def test_a_bad_base_is_refused() -> None:
    with pytest.raises(TypeError, match="base is Conv1d"):
        LoRALinear(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="must not be wrapped already"):
        LoRALinear(LoRALinear(nn.Linear(8, 8)))
