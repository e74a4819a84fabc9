"""The adapters of multi_lora_linear on the CPU, on each instruction set this machine can run.

The tests of the public op are in test_multi_lora_linear.py. The cases here make the kernels take
other branches: every remainder of tiles and panels, groups of one token and of many, ranks beyond a
chain of a sum, several threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pylora
import pylora.functional as F
from pylora.backends import cpu, extension, limits
from pylora.calls import Adapters, Layer, MultiLoraBackward, MultiLoraCall, Wanted, Weight
from pylora.reference.multi_lora_linear import add_adapters, add_adapters_backward
from pylora.selfcheck import cpu_isa
from pylora.testing import assert_as_accurate_as_torch

_C = pytest.importorskip("pylora._C", exc_type=ImportError)
ops = torch.ops.pylora_C

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32), (FP32, BF16)]
# tokens, out_features, in_features, adapters, rank, the order of the ids
SHAPES = [
    (0, 64, 64, 3, 4, "mixed"),
    (1, 65, 13, 1, 1, "one for all"),
    (5, 33, 96, 2, 7, "none"),
    (9, 7, 577, 4, 16, "mixed"),  # odd sizes on both sides
    (40, 129, 45, 65, 5, "mixed"),  # most adapters have one token or none
    (70, 48, 200, 3, 33, "sorted"),
    (70, 300, 64, 3, 64, "mixed"),
    (130, 100, 70, 1, 16, "one for all"),
    (600, 24, 40, 2, 100, "mixed"),
]


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_ids(tokens: int, adapters: int, order: str) -> Tensor:
    if order in ("one for all", "none"):
        return torch.full((tokens,), adapters - 1 if order == "one for all" else -1)
    ids = torch.randint(-1, adapters, (tokens,))
    return ids.sort().values if order == "sorted" else ids


def make(
    tokens: int,
    out_features: int,
    in_features: int,
    adapters: int,
    rank: int,
    order: str = "mixed",
    dtype: torch.dtype = FP32,
    lora_dtype: torch.dtype = FP32,
) -> tuple[tuple, tuple]:
    """Returns the arguments of multi_lora_add, and those of its backward without the mask."""

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    stacks = (
        normal(adapters, rank, in_features, scale=in_features**-0.5, dtype=lora_dtype),
        normal(adapters, out_features, rank, dtype=lora_dtype),
        make_ids(tokens, adapters, order),
        torch.rand(adapters) + 0.5,
    )
    x, y = normal(tokens, in_features), normal(tokens, out_features)
    grad, dx = normal(tokens, out_features), normal(tokens, in_features)
    _, h = in_torch(x, *stacks, y)
    return (x, *stacks, y), (grad, x, h, *stacks, dx)


def in_torch(x: Tensor, A: Tensor, B: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """Returns y plus the adapters, and h."""
    ids, scalings, y = rest
    y = y.clone()
    layer = Layer(Weight.dense(A.new_empty(B.shape[1], A.shape[2])))
    return y, add_adapters(MultiLoraCall(x, layer, Adapters(A, B, ids, scalings)), y)


def in_torch_backward(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, *rest: Tensor
) -> tuple[Tensor | None, ...]:
    """Returns dx plus the adapters, and the gradients of A and B."""
    ids, scalings, dx = rest
    dx, wanted = dx.clone(), Wanted(x=True, A=True, B=True)
    layer = Layer(Weight.dense(A.new_empty(B.shape[1], A.shape[2])))
    stacks = Adapters(A, B, ids, scalings)
    return dx, *add_adapters_backward(MultiLoraBackward(grad, x, h, layer, stacks, wanted), dx)


def compiled(*forward: Tensor) -> tuple[Tensor, Tensor]:
    *others, y = forward
    y = y.clone()
    h = ops.multi_lora_add(*others, y)
    return y, h


def compiled_backward(*backward: Tensor) -> tuple[Tensor, ...]:
    *others, dx = backward
    dx = dx.clone()
    return dx, *ops.multi_lora_add_backward(*others, [True, True], dx)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_adapters_obey_the_numerics_rule(
    isa: str, shape: tuple, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    forward, backward = make(*shape, *dtypes)
    assert_as_accurate_as_torch(compiled(*forward), in_torch, *forward)
    assert_as_accurate_as_torch(compiled_backward(*backward), in_torch_backward, *backward)


@pytest.mark.parametrize("rank", [1, 2, 8, 31, 32, 64, 300, 1024])
def test_every_rank_obeys_the_numerics_rule(isa: str, rank: int) -> None:
    for dtype in (FP32, BF16):
        forward, backward = make(90, 72, 416, 3, rank, "mixed", dtype, dtype)
        assert_as_accurate_as_torch(compiled(*forward), in_torch, *forward)
        assert_as_accurate_as_torch(compiled_backward(*backward), in_torch_backward, *backward)


@pytest.mark.parametrize("shape", [(3, 640, 640, 3, 16), (64, 300, 640, 40, 16)], ids=str)
@pytest.mark.parametrize("order", ["mixed", "one for all"])
def test_threads_do_not_change_a_bit(isa: str, threads: None, shape: tuple, order: str) -> None:
    forward, backward = make(*shape, order, BF16, BF16)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append((*compiled(*forward), *compiled_backward(*backward)))
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_no_adapter_reaches_another_one(isa: str, dtype: torch.dtype) -> None:
    """A NaN in a factor or in a token stays with its adapter, also in the paddings of tiles."""
    forward, backward = make(50, 70, 90, 4, 5, "mixed", dtype, dtype)
    ids = forward[3]
    others = ids != 2
    expected, gradients = compiled(*forward), compiled_backward(*backward)
    for place in (0, 1, 2):  # x, lora_A and lora_B of the forward
        poisoned = list(forward)
        poisoned[place] = forward[place].clone()
        poisoned[place][~others if place == 0 else 2] = torch.nan
        y, h = compiled(*poisoned)
        assert torch.equal(y[others], expected[0][others])
        assert torch.equal(h[others], expected[1][others])
        assert y[~others].isnan().all()
    for place in (0, 1, 2, 3, 4):  # grad, x, h, lora_A and lora_B of the backward
        poisoned = list(backward)
        poisoned[place] = backward[place].clone()
        poisoned[place][~others if place < 3 else 2] = torch.nan
        dx, *factors = compiled_backward(*poisoned)
        assert torch.equal(dx[others], gradients[0][others])
        for result, right in zip(factors, gradients[1:], strict=True):
            assert torch.equal(result[[0, 1, 3]], right[[0, 1, 3]])


def test_tokens_without_an_adapter_keep_the_base(isa: str) -> None:
    """An adapter without tokens gets gradients of zeros, whatever was in their memory."""
    forward, backward = make(20, 48, 64, 3, 4, "mixed", BF16, BF16)
    forward[3].fill_(-1)[7] = 1
    y, h = compiled(*forward)
    dx, dA, dB = compiled_backward(*backward)
    rest = torch.arange(20) != 7
    assert torch.equal(y[rest], forward[-1][rest]) and not h[rest].any()
    assert torch.equal(dx[rest], backward[-1][rest])
    for gradient in (dA, dB):
        assert gradient[1].all() and not gradient[[0, 2]].any()


def test_only_what_is_wanted_is_computed(isa: str) -> None:
    _, (*backward, dx) = make(20, 48, 64, 3, 4)
    _, dA, dB = compiled_backward(*backward, dx)
    only_A = ops.multi_lora_add_backward(*backward, [True, False], None)
    only_B = ops.multi_lora_add_backward(*backward, [False, True], None)
    assert torch.equal(only_A[0], dA) and only_A[1].shape == (0,)
    assert torch.equal(only_B[1], dB) and only_B[0].shape == (0,)


def test_strides_and_leading_sizes_change_no_result() -> None:
    forward, backward = make(6, 48, 64, 3, 4, "mixed", BF16, FP32)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]

    def shaped(arguments: tuple, matrices: int) -> list[Tensor]:
        tensors = [t.view(2, 3, -1) for t in arguments[:matrices]]
        return [*map(spread, [*tensors, *arguments[matrices:-1]]), arguments[-1]]

    for run, arguments, matrices in ((compiled, forward, 1), (compiled_backward, backward, 3)):
        results = run(*shaped(arguments, matrices))
        for result, expected in zip(results, run(*arguments), strict=True):
            assert torch.equal(result.flatten(), expected.flatten())


def check_whole_op(weight: Tensor | pylora.NF4Weight, x: Tensor, *stacks: Tensor) -> None:
    @pylora.use_backend("reference")
    def reference(x: Tensor, *stacks: Tensor) -> Tensor:
        base = weight if isinstance(weight, Tensor) else weight.dequantize(x.dtype)
        return F.multi_lora_linear(x, base.to(x.dtype), *stacks)

    y = F.multi_lora_linear(x, weight, *stacks)
    assert_as_accurate_as_torch(y, reference, x, *stacks)


@pytest.mark.parametrize("kind", ["nf4", "nested", "dense"])
@pytest.mark.parametrize("tokens", [1, 8, 70])
def test_every_base_gets_the_adapters(isa: str, kind: str, tokens: int) -> None:
    weight: Tensor | pylora.NF4Weight = torch.randn(65, 96) / 10
    if kind != "dense":
        weight = pylora.quantize_nf4(weight, 32, double_quant=kind == "nested")
    x, *stacks, _ = make(tokens, 65, 96, 3, 8)[0]
    plan = pylora.explain("multi_lora_linear", x, weight, *stacks)
    base = "a dense layer in torch" if kind == "dense" else f"nf4_linear ({isa})"
    assert plan.variant == f"composed of {base}, the adapters ({isa})"
    check_whole_op(weight, x, *stacks)


def test_many_tokens_keep_the_products_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of many tokens runs as that of nf4_linear does."""
    monkeypatch.setattr(limits, "CPU_AMX_PRODUCTS_FROM", 1)
    monkeypatch.setattr(limits, "CPU_AMX_PRODUCTS_WORK", 1)
    monkeypatch.setattr(cpu, "_instruction_set", lambda: "amx")
    weight = pylora.quantize_nf4((torch.randn(48, 64) / 8).to(BF16))
    x, *stacks, _ = make(20, 48, 64, 3, 4, "mixed", BF16, BF16)[0]
    base = "nf4_linear (amx, panels multiplied in torch)"
    variant = pylora.explain("multi_lora_linear", x, weight, *stacks).variant
    assert variant == f"composed of {base}, the adapters (amx)"
    check_whole_op(weight, x, *stacks)


def test_torch_runs_the_adapters_that_the_kernels_do_not_take() -> None:
    most = extension.hard_limits("cpu")["max_rank"]
    x, *stacks, _ = make(5, 16, 64, 2, most + 1)[0]
    weight = torch.randn(16, 64)
    plan = pylora.explain("multi_lora_linear", x, pylora.quantize_nf4(weight), *stacks)
    assert plan.variant.endswith("the adapters in torch")
    reason = f"the rank is {most + 1}; the kernels take up to {most}"
    assert plan.notes == (reason,)
    dense = pylora.explain("multi_lora_linear", x, weight, *stacks)
    assert dense.backend == "reference" and reason in str(dense)


def test_errors_name_the_argument() -> None:
    (x, A, B, ids, scalings, y), backward = make(6, 48, 64, 3, 4)
    *others, dx = backward
    forward = (x, A, B, ids, scalings)
    cases = [
        (0, x[:, :0], "x must have a column or more"),
        (1, A[0], "lora_A must have 3 dimensions"),
        (1, A[:, :0], "lora_A must have 1 to 1024 rows"),
        (2, B[:2], r"lora_B must have shape \[3, 48, 4\], got \[2, 48, 4\]"),
        (3, ids[:5], r"adapter_ids must have 6 elements \(one for every token\)"),
        (3, ids.int(), "adapter_ids must have dtype Long"),
        (4, scalings.double(), "scalings must have dtype Float"),
    ]
    for place, wrong, message in cases:
        arguments = (*forward[:place], wrong, *forward[place + 1 :])
        with pytest.raises(RuntimeError, match=message):
            ops.multi_lora_add(*arguments, y)
    for name, wrong, message in (
        ("y", y.t().contiguous().t(), "must be contiguous"),
        ("y", y[:5], r"must have 288 elements \(48 for every token of x\), got 240"),
        ("y", y.half(), "must have dtype Float"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} {message}"):
            ops.multi_lora_add(*forward, wrong)
    with pytest.raises(RuntimeError, match="output_mask must have 2 values, got 1"):
        ops.multi_lora_add_backward(*others, [True], dx)
    with pytest.raises(RuntimeError, match=r"grad must have as many rows as x \(6\), got 5"):
        ops.multi_lora_add_backward(others[0][:5], *others[1:], [True, True], dx)
    with pytest.raises(RuntimeError, match="h must have 24 elements"):
        ops.multi_lora_add_backward(*others[:2], others[2][:5], *others[3:], [True, True], dx)
