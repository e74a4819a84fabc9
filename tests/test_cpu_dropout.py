"""LoRA with dropout over a dense weight on a CPU: torch's products, and the extension's masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
import pylora.functional as F
from pylora.backends import cpu, extension
from pylora.calls import Dropout
from pylora.nn import LoRALinear
from pylora.projections import Projection
from pylora.reference.dropout import dropout
from pylora.selfcheck import cpu_isa

pytestmark = pytest.mark.skipif(
    cpu.BACKEND.unavailable() is not None, reason="the extension was not built"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = 123456789012345


@pytest.fixture(params=extension.load()[0].cpu_isas() if extension.load()[0] else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 7), (2, 33, 129), (100, 2048)])
def test_the_elements_are_those_of_the_reference(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    if x.numel():
        x.view(-1)[0] = torch.inf  # it must not become NaN if it is dropped
    for p in (0.1, 0.5, 0.999):
        record = Dropout(p, torch.tensor(SEED), stream=2)
        assert torch.equal(extension.dropout(x, record), dropout(x, record))
    assert extension.dropout(x, None) is x


def test_threads_change_no_element(isa: str) -> None:
    x, record, before = (
        torch.randn(90, 2000),
        Dropout(0.3, torch.tensor(7)),
        torch.get_num_threads(),
    )
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(extension.dropout(x, record))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_without_an_element_to_drop_it_is_refused() -> None:
    x, seed = torch.randn(3), torch.tensor(1)
    with pytest.raises(RuntimeError, match="dropout_p must be above 0, got 0"):
        torch.ops.pylora_C.dropout(x, 0.0, seed)
    with pytest.raises(RuntimeError, match=r"dropout_p must be in \[0, 1\), got 1"):
        torch.ops.pylora_C.dropout(x, 1.0, seed)
    with pytest.raises(RuntimeError, match="seed must be given"):
        torch.ops.pylora_C.dropout(x, 0.5, None)


def results_of(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
def test_a_dense_layer_gives_the_bits_of_the_reference(
    isa: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """The products are the same, and so are the masks."""
    x = torch.randn(2, 9, 64).to(dtypes[0])
    weight = torch.randn(40, 64).to(dtypes[0])
    factors = [torch.randn(4, 64).to(dtypes[1]), torch.randn(40, 4).to(dtypes[1])]
    leaves = [t.requires_grad_() for t in (x, weight, *factors)]
    options = {"dropout_p": 0.4, "seed": SEED}

    def run() -> list[Tensor]:
        return results_of(F.lora_linear(x, weight, *factors, 0.5, **options), leaves)

    explanation = pylora.explain("lora_linear", x, weight, *factors, 0.5, **options)
    assert explanation.variant == f"dense in torch, dropout ({isa})"
    assert explanation.backward.variant == f"dense in torch, dropout ({isa})"
    actual = run()
    with pylora.use_backend("reference"):
        expected = run()
    assert all(map(torch.equal, actual, expected))


def test_dense_layers_of_composed_ops_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is NF4, because the reference runs an op of dense layers alone."""
    x = torch.randn(9, 64, requires_grad=True)
    weights: list[Any] = [torch.randn(64, 64) / 8 for _ in range(3)]
    weights[0] = pylora.quantize_nf4(weights[0])
    factors = [(torch.randn(4, 64) / 8, torch.randn(64, 4) / 2) for _ in weights]
    layers = [Projection(w, A, B, 0.5) for w, (A, B) in zip(weights, factors, strict=True)]
    calls = 0
    original = extension.dropout

    def counted(x: Tensor, record: Dropout | None) -> Tensor:
        nonlocal calls
        calls += 1
        return original(x, record)

    def run() -> list[Tensor]:
        ys = F.lora_qkv(x, *layers, dropout_p=0.4, seed=SEED)
        return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x])]

    monkeypatch.setattr(extension, "dropout", counted)
    actual = run()
    assert calls == 4  # forward and dx of both dense layers
    with pylora.use_backend("reference"):
        expected = run()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_module_drops_anew_in_each_call() -> None:
    layer = LoRALinear(nn.Linear(64, 40), 4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(30, 64)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)

    first: Any = drawn(0)
    assert torch.equal(drawn(0), first) and not torch.equal(drawn(1), first)
    assert torch.equal(layer.eval()(x), layer(x))


def test_what_the_kernel_does_not_take_runs_on_the_reference() -> None:
    x, weight = torch.randn(9, 64).double(), torch.randn(40, 64).double()
    A, B = torch.randn(4, 64).double(), torch.randn(40, 4).double()
    explanation = pylora.explain("lora_linear", x, weight, A, B, 0.5, dropout_p=0.4, seed=1)
    assert explanation.backend == "reference"
