"""Fixtures that all tests share: poisoned buffers, fixed seeds, and this machine's backends."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import pylora
from pylora import dispatch, reference
from pylora.functional import Projection
from pylora.selfcheck import checked_backends, cpu_isa
from pylora.testing import assert_as_accurate_as_torch

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` puts the repository root on the path, where our kernels/ would hide the Hugging
# Face package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]


def _load(name: str, path: Path) -> None:
    """Loads a module without putting its folder on sys.path, where kernels/ must not be found."""
    folders = [str(path.parent)] if path.stem == "__init__" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load("benchmarks", ROOT / "benchmarks" / "__init__.py")
_load("adapter_models", ROOT / "tests" / "adapter_models.py")
_load("bottleneck_calls", ROOT / "tests" / "bottleneck_calls.py")
_load("flat_calls", ROOT / "tests" / "flat_calls.py")
if importlib.util.find_spec("bitsandbytes"):
    _load("peft_models", ROOT / "tests" / "peft_models.py")
_load("peft_nf4_models", ROOT / "tests" / "peft_nf4_models.py")
_load("kept_objects", ROOT / "tools" / "kept_objects.py")
_load("host_cuda", ROOT / "tests" / "host_cuda" / "__init__.py")

VARIANTS = [("reference", "pure PyTorch", None), *checked_backends()]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """Makes torch.empty give NaN, so that an element that no kernel wrote is seen."""
    torch.manual_seed(20240229)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Gives the process its environment back, which a test or a library may have changed.

    PEFT leaves CXX=gcc behind if the extension of its BOFT layers does not compile.
    """
    with mock.patch.dict(os.environ):
        yield
    pylora.refresh()  # reads the environment anew


@pytest.fixture(autouse=True, scope="session")
def bitsandbytes_keeps_its_weights() -> Iterator[None]:
    """Gives bitsandbytes the same results on every CPU, so that it can be compared with.

    On a CPU with AVX-512 BF16 its layers repack themselves in their first forward in eval mode,
    round their absmax to bf16, and compute in bf16. The tests of that switch it on.
    """
    if "bitsandbytes" not in sys.modules:
        yield
        return
    with mock.patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=False):
        yield


def _parameter(variant: tuple[str, str, str | None]) -> Any:
    name, _, isa = variant
    marks = [pytest.mark.gpu] if dispatch.BACKENDS[name].device() == "cuda" else []
    return pytest.param(variant, marks=marks, id=f"{name}-{isa or 'default'}")


@pytest.fixture(params=map(_parameter, VARIANTS))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yields the name of each backend that can run here, for the CPU once per instruction set.

    Every backward runs on the thread of the test: on another one `use_backend` would not hold for
    compiled functions.
    """
    name, _, isa = request.param
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with dispatch.use_backend(name), cpu_isa(isa), one_thread:
        yield name


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Path]:
    """Builds a program of host_cuda/ together with the kernels that it runs."""
    from host_cuda import compiled

    return compiled


@pytest.fixture
def device(backend: str) -> str:
    """The device on which the tensors of a test of `backend` must be."""
    return dispatch.BACKENDS[backend].device()


@pytest.fixture
def make_projection() -> Callable[..., Projection]:
    """A Projection of random trainable tensors over an "nf4", "nested" or "dense" weight."""

    def make(
        out_features: int,
        in_features: int,
        rank: int | None,
        weight_kind: str = "nf4",
        dtype: torch.dtype = torch.float32,
        lora_dtype: torch.dtype | None = None,
        device: str = "cpu",
        blocksize: int = 64,
        has_bias: bool = False,
        scaling: float = 0.5,
    ) -> Projection:
        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

        scale, low_rank = in_features**-0.5, lora_dtype or dtype
        weight: Tensor | pylora.NF4Weight
        if weight_kind == "dense":
            weight = normal(out_features, in_features, dtype=dtype, scale=scale)
        else:
            values = torch.randn(out_features, in_features, device=device) * scale
            weight = pylora.quantize_nf4(values, blocksize, double_quant=weight_kind == "nested")
        bias = normal(out_features, dtype=dtype) if has_bias else None
        if rank is None:
            return Projection(weight, bias=bias)
        lora_A = normal(rank, in_features, dtype=low_rank, scale=scale)
        lora_B = normal(out_features, rank, dtype=low_rank)
        return Projection(weight, lora_A, lora_B, scaling, bias)

    return make


@pytest.fixture
def plain_projection() -> Callable[..., Tensor]:
    """Computes what PEFT computes over a dequantized base.

    `mask` holds 0 or 1 / (1 - dropout_p) for each element of x.
    """

    def plain(x: Tensor, projection: Projection, mask: Tensor | None = None) -> Tensor:
        weight, lora_A, lora_B, scaling, bias = projection
        if isinstance(weight, pylora.NF4Weight):
            weight = reference.dense(weight.record, x.dtype)
        y = linear(x, weight, bias)
        if lora_A is None or lora_B is None:
            return y
        dropped = x.to(lora_A.dtype)
        if mask is not None:
            dropped = dropped * mask.to(lora_A.dtype)
        return (y + linear(linear(dropped, lora_A), lora_B) * scaling).to(x.dtype)

    return plain


@pytest.fixture
def tensors_of() -> Callable[..., list[Tensor]]:
    """Returns the dense tensors of projections, in order."""
    return lambda *projections: [
        part for projection in projections for part in projection if isinstance(part, Tensor)
    ]


@pytest.fixture
def check_projections(tensors_of: Callable[..., list[Tensor]]) -> Callable[..., None]:
    """Judges a function of x and projections: its outputs and every gradient must obey the numerics
    rule against autograd through `plain_torch`."""

    def as_leaves(projection: Projection) -> Projection:
        parts = (p.detach().requires_grad_() if isinstance(p, Tensor) else p for p in projection)
        return Projection(*parts)

    def check(
        function: Callable[..., Any],
        plain_torch: Callable[..., Any],
        x: Tensor,
        *projections: Projection,
    ) -> None:
        def gradients(grads: Any, x: Tensor, *projections: Projection) -> Any:
            x, leaves = x.detach().requires_grad_(), [as_leaves(p) for p in projections]
            return torch.autograd.grad(plain_torch(x, *leaves), [x, *tensors_of(*leaves)], grads)

        outputs = function(x, *projections)
        assert_as_accurate_as_torch(outputs, plain_torch, x, *projections)
        several = isinstance(outputs, tuple)
        grads = tuple(map(torch.randn_like, outputs)) if several else torch.randn_like(outputs)
        actual = torch.autograd.grad(outputs, [x, *tensors_of(*projections)], grads)
        assert_as_accurate_as_torch(actual, gradients, grads, x, *projections)

    return check


@pytest.fixture
def check_against_peft() -> Callable[..., None]:
    """Compares a function of x and projections with a bf16 module on which PEFT has put fp32 LoRA.

    PEFT wraps the linear layers that `targets` names. The outputs and the gradients of x and of
    every LoRA factor are compared.
    """

    def check(
        module: torch.nn.Module, targets: list[str], function: Callable[..., Any], x: Tensor
    ) -> None:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=40, lora_alpha=80, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(lora, module)
        values = {name: parameter.detach() for name, parameter in module.named_parameters()}
        values |= {name: value.float() for name, value in values.items() if "lora" in name}
        trained = [name for name in values if "lora" in name]

        def with_gradients(forward: Any, x: Tensor, values: Any, grads: tuple[Tensor, ...]) -> Any:
            leaves = {n: v.detach().requires_grad_(n in trained) for n, v in values.items()}
            x = x.detach().requires_grad_()
            y = forward(x, leaves)
            outputs = y if isinstance(y, tuple) else (y,)
            wanted = [x, *(leaves[name] for name in trained)]
            return outputs, torch.autograd.grad(outputs, wanted, grads)

        def through_peft(x: Tensor, values: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(module, values, (x,))

        def ours(x: Tensor, values: dict[str, Tensor]) -> Any:
            def projection(name: str) -> Projection:
                factors = (values[f"{name}.lora_{which}.default.weight"] for which in "AB")
                return Projection(values[f"{name}.base_layer.weight"], *factors, 2.0)

            return function(x, *map(projection, targets))

        y = through_peft(x, values)
        args = (x, values, tuple(map(torch.randn_like, y if isinstance(y, tuple) else (y,))))
        actual = with_gradients(ours, *args)
        assert_as_accurate_as_torch(actual, with_gradients, through_peft, *args)

    return check
