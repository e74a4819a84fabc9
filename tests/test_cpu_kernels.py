"""torch.ops.pylora_C.*: the CPU's linear kernels, on each instruction set this machine can run.

The tests of the public ops are in other files. The cases here make the kernels take other branches:
few and many tokens, every panel and tile remainder, blocks that straddle rows, ranks beyond a tile,
several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from flat_calls import reference_op
from torch import Tensor

import pylora
from pylora.backends.extension import ACTIVATION_CODES
from pylora.testing import assert_as_accurate_as_torch

_C = pytest.importorskip("pylora._C", exc_type=ImportError)
ops = torch.ops.pylora_C

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRADIENTS = [True, False, True, True, True, True, True]

# Each shape: tokens, out_features, in_features, blocksize, nested.
SHAPES = [
    (0, 64, 128, 64, False),
    (1, 65, 128, 64, False),
    (2, 40, 4128, 64, True),  # two rounds of absmax look-ups, and a chunk that is cut short
    (5, 33, 96, 32, True),
    (8, 48, 576, 256, False),  # rows that start inside a block
    (3, 7, 13, 32, False),  # no whole group of 32 weights
    (9, 130, 192, 64, False),
    (16, 24, 3420, 64, True),
    (33, 100, 1056, 32, False),
    (50, 49, 640, 128, True),
    (130, 97, 320, 4096, False),
    (530, 16, 64, 64, False),  # two batches of tokens
]


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def nf4(out_features: int, in_features: int, blocksize: int, nested: bool) -> tuple:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    with pylora.use_backend("reference"):
        return pylora.quantize_nf4(weight, blocksize, nested).op_arguments()


def lora(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    q: tuple,
    **options,
) -> tuple[tuple, tuple]:
    """Returns the arguments of lora_linear and, for the same inputs, of lora_linear_backward."""
    lora_dtype = options.get("lora_dtype", dtype)
    p = options.get("dropout_p", 0.0)
    trailing = (
        0.75,
        p,
        torch.tensor(2**40 + 12345) if p else None,
        options.get("activation", "identity"),
    )
    x, grad = (
        torch.randn(tokens, in_features).to(dtype),
        torch.randn(tokens, out_features).to(dtype),
    )
    lora_A = (torch.randn(rank, in_features) / in_features**0.5).to(lora_dtype)
    lora_B = torch.randn(out_features, rank).to(lora_dtype)
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if options.get("biases", False):
        biases = (
            torch.randn(out_features).to(dtype),
            torch.randn(rank).to(lora_dtype),
            torch.randn(out_features).to(lora_dtype),
        )
    forward = (x, *q, out_features, lora_A, lora_B, *biases, *trailing)
    h = reference_op("lora_linear")(*forward)[1]
    return forward, (grad, x, h, *q, lora_A, lora_B, *trailing, GRADIENTS)


def coded(arguments: tuple) -> tuple:
    """Replaces activation names by their numbers, which the compiled ops take."""
    return tuple(ACTIVATION_CODES[a] if isinstance(a, str) else a for a in arguments)


def lora_linear(*forward) -> tuple[Tensor, ...]:
    return ops.lora_linear(*coded(forward))


def lora_linear_backward(*backward) -> tuple[Tensor, ...]:
    return ops.lora_linear_backward(*coded(backward))


def check_lora(*draws: tuple[tuple, tuple]) -> None:
    """Compares forwards and backwards with the reference, each over all draws at once."""

    def of_all(op: Callable[..., tuple], calls: tuple[tuple, ...]) -> list[Tensor]:
        return [torch.stack(output) for output in zip(*(op(*call) for call in calls), strict=True)]

    forwards, backwards = zip(*draws, strict=True)
    for op, calls in ((lora_linear, forwards), (lora_linear_backward, backwards)):
        reference = reference_op(op.__name__)
        assert_as_accurate_as_torch(of_all(op, calls), of_all, reference, calls)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_linear(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    tokens, out_features, in_features, blocksize, nested = shape
    q = nf4(out_features, in_features, blocksize, nested)
    x, grad = (
        torch.randn(tokens, in_features).to(dtype),
        torch.randn(tokens, out_features).to(dtype),
    )
    bias = torch.randn(out_features).to(dtype)
    forward = (x, *q, out_features, bias)
    assert_as_accurate_as_torch(ops.nf4_linear(*forward), reference_op("nf4_linear"), *forward)
    backward = (grad, *q, in_features)
    assert_as_accurate_as_torch(
        ops.nf4_linear_backward(*backward), reference_op("nf4_linear_backward"), *backward
    )


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_blocksize_equals_the_reference(isa: str, blocksize: int) -> None:
    q = nf4(20, 512, blocksize, nested=True)
    for tokens, dtype in ((4, BF16), (4, FP32), (20, BF16)):
        args = (torch.randn(tokens, 512).to(dtype), *q, 20, None)
        assert_as_accurate_as_torch(ops.nf4_linear(*args), reference_op("nf4_linear"), *args)


@pytest.mark.parametrize(
    "dtype, lora_dtype", [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP16)], ids=str
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_lora_linear(
    isa: str, dtype: torch.dtype, lora_dtype: torch.dtype, dropout_p: float
) -> None:
    for tokens, out_features, in_features, blocksize, nested in SHAPES[dropout_p > 0.0 :: 2]:
        q = nf4(out_features, in_features, blocksize, nested)
        options = dict(lora_dtype=lora_dtype, dropout_p=dropout_p, biases=dropout_p == 0.0)
        check_lora(lora(tokens, out_features, in_features, 16, dtype, q, **options))


@pytest.mark.parametrize("rank", [1, 5, 33, 64, 100, 300, 512])
def test_every_rank_equals_the_reference(isa: str, rank: int) -> None:
    q = nf4(72, 416, 32, nested=False)
    for tokens, dropout_p in ((3, 0.0), (28, 0.0), (70, 0.5)):
        draws = 16 if tokens * rank < 100 else 1  # the errors of a few products are luck
        options = dict(lora_dtype=FP32, dropout_p=dropout_p)
        check_lora(*(lora(tokens, 72, 416, rank, BF16, q, **options) for _ in range(draws)))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_every_activation_equals_the_reference(isa: str, activation: str) -> None:
    q = nf4(40, 128, 64, nested=False)
    for dtype in (FP32, BF16):
        check_lora(
            lora(37, 40, 128, 24, dtype, q, activation=activation, lora_dtype=FP32, biases=True)
        )


@pytest.mark.parametrize("tokens", [1, 6, 40, 600])
def test_threads_do_not_change_a_bit(isa: str, threads: None, tokens: int) -> None:
    q = nf4(300, 640, 64, nested=False)
    forward, backward = lora(tokens, 300, 640, 16, BF16, q, lora_dtype=FP32, dropout_p=0.1)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append((*lora_linear(*forward), *lora_linear_backward(*backward)))
    assert all(map(torch.equal, *results))


def test_only_the_gradients_in_the_output_mask_are_computed(isa: str) -> None:
    q = nf4(48, 64, 64, nested=False)
    _, backward = lora(5, 48, 64, 4, BF16, q)
    everything = lora_linear_backward(*backward)
    for wanted in (0, 2, 3, 4, 5, 6):
        mask = [index == wanted for index in range(7)]
        results = lora_linear_backward(*backward[:-1], mask)
        for index, (result, expected) in enumerate(zip(results, everything, strict=True)):
            assert torch.equal(result, expected) if index == wanted else result.shape == (0,)


def test_a_nan_stays_in_its_row(isa: str) -> None:
    """Neither the padding of a tile nor the leftovers of an earlier call reach a result."""
    for tokens in (3, 20, 100):
        q = nf4(50, 160, 32, nested=False)
        x = torch.randn(tokens, 160).to(BF16)
        expected = ops.nf4_linear(x, *q, 50, None)
        poisoned = x.clone()
        poisoned[1] = torch.nan
        result = ops.nf4_linear(poisoned, *q, 50, None)
        assert result[1].isnan().all()
        other_tokens = torch.arange(tokens) != 1
        assert torch.equal(result[other_tokens], expected[other_tokens])
        assert torch.equal(ops.nf4_linear(x, *q, 50, None), expected)


def strided(tensor: Tensor) -> Tensor:
    """Returns the same values with gaps between them in memory."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]


def test_strides_and_leading_sizes_change_no_result() -> None:
    """The results equal those for contiguous matrices and keep the leading sizes of x or grad."""
    q = nf4(48, 64, 64, nested=True)
    forward, backward = lora(6, 48, 64, 4, BF16, q, dropout_p=0.25, biases=True, lora_dtype=FP32)

    def spread(arguments: tuple, matrices: int) -> tuple:
        """Gives the first `matrices` arguments the shape [2, 1, 3, ...], and every tensor
        strides."""
        shaped = [t.view(2, 1, 3, -1) for t in arguments[:matrices]]
        tensors = (*shaped, *arguments[matrices:])
        return tuple(strided(t) if isinstance(t, Tensor) else t for t in tensors)

    for op, arguments, matrices in (
        (ops.nf4_linear, (forward[0], *q, 48, forward[11]), 1),
        (ops.nf4_linear_backward, (backward[0], *q, 64), 1),
        (lora_linear, forward, 1),
        (lora_linear_backward, backward, 3),
    ):
        expected, got = op(*arguments), op(*spread(arguments, matrices))
        as_tuple = (lambda r: r) if isinstance(expected, tuple) else (lambda r: (r,))
        for result, flat_result in zip(as_tuple(got), as_tuple(expected), strict=True):
            assert result.is_contiguous() and torch.equal(result.flatten(), flat_result.flatten())
            if flat_result.shape[:1] == (6,):
                assert result.shape == (2, 1, 3, flat_result.shape[1])


def test_a_vector_is_one_token() -> None:
    q = nf4(48, 64, 64, nested=False)
    x = torch.randn(64)
    y = ops.nf4_linear(x, *q, 48, None)
    assert y.shape == (48,) and torch.equal(y, ops.nf4_linear(x[None], *q, 48, None)[0])


@pytest.mark.parametrize("leading", [(3, 0), (0, 2)])
def test_no_tokens_give_empty_results(leading: tuple[int, int]) -> None:
    q = nf4(48, 64, 64, nested=False)
    assert ops.nf4_linear(torch.zeros(*leading, 64), *q, 48, None).shape == (*leading, 48)
    assert ops.nf4_linear_backward(torch.zeros(*leading, 48), *q, 64).shape == (*leading, 64)


def test_no_in_features_are_refused_and_no_out_features_are_not(isa: str) -> None:
    """A kernel cannot sum over no columns, but a result may have no columns."""
    q = (torch.empty(0, dtype=torch.uint8), torch.empty(0), None, None, None, 64, 0)
    with pytest.raises(RuntimeError, match=r"x must have a column or more, got .* \[2, 3, 0\]"):
        ops.nf4_linear(torch.empty(2, 3, 0), *q, 48, None)
    with pytest.raises(RuntimeError, match="grad must have a column or more"):
        ops.nf4_linear_backward(torch.empty(2, 3, 0), *q, 48)
    assert ops.nf4_linear(torch.empty(2, 3, 64), *q, 0, None).shape == (2, 3, 0)
    assert ops.nf4_linear_backward(torch.empty(2, 3, 48), *q, 0).shape == (2, 3, 0)


def test_no_result_is_a_view() -> None:
    """Autograd forbids changing a view in place if a custom function returned it."""
    x = torch.randn(2, 3, 64)
    y = ops.nf4_linear(x, *nf4(48, 64, 64, nested=False), 48, None)
    assert y._base is None and not y._is_view()


def test_errors_name_the_argument() -> None:
    q = nf4(48, 64, 64, nested=False)
    forward, backward = lora(5, 48, 64, 4, BF16, q)
    with pytest.raises(RuntimeError, match="x must have 1 dimension or more, got a scalar"):
        ops.nf4_linear(torch.zeros(()), *q, 48, None)
    with pytest.raises(RuntimeError, match="qweight must have 1560 elements"):
        ops.nf4_linear(torch.zeros(3, 65), *q, 48, None)
    with pytest.raises(RuntimeError, match="bias must have 48 elements"):
        ops.nf4_linear(torch.zeros(3, 64), *q, 48, torch.zeros(47))
    for code in (-1, 7):
        wrong = rf"activation must be a code from 0 \(identity\) to 6 \(sigmoid\), got {code}"
        with pytest.raises(RuntimeError, match=wrong):
            ops.lora_linear(*forward[:-1], code)
    with pytest.raises(RuntimeError, match="seed must be given"):
        ops.lora_linear(*forward[:-3], 0.5, None, 0)
    with pytest.raises(RuntimeError, match="absmax must be a tensor, got None"):
        ops.lora_linear(*coded(forward[:2]), None, *coded(forward[3:]))
    with pytest.raises(RuntimeError, match="output_mask must not ask for dweight"):
        lora_linear_backward(*backward[:-1], [True] * 7)
    with pytest.raises(RuntimeError, match="output_mask must have 7 values, got 6"):
        lora_linear_backward(*backward[:-1], [True] * 6)
    with pytest.raises(RuntimeError, match=r"grad must have as many rows as x \(5\), got 4"):
        lora_linear_backward(backward[0][:4], *backward[1:])
    with pytest.raises(RuntimeError, match=r"h must have 20 elements .*, got 16 in shape"):
        lora_linear_backward(*backward[:2], backward[2][:4], *backward[3:])
    for index, name, wrong in (
        (9, "lora_A", torch.zeros(4, 63, dtype=BF16)),
        (10, "lora_B", torch.zeros(47, 4, dtype=BF16)),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must have shape .*, got"):
            lora_linear(*forward[:index], wrong, *forward[index + 1 :])


def test_a_call_that_fails_keeps_none_of_its_arguments() -> None:
    """All arguments are read, and so released, before the first check."""
    q = nf4(48, 64, 64, nested=True)
    forward, _ = lora(5, 48, 64, 4, BF16, q, dropout_p=0.5, biases=True)
    tensors = [argument for argument in forward if isinstance(argument, Tensor)]
    before = [tensor._use_count() for tensor in tensors]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="x must have 1 dimension or more"):
            lora_linear(torch.zeros((), dtype=BF16), *forward[1:])
        with pytest.raises(RuntimeError, match="activation must be"):
            ops.lora_linear(*forward[:-1], 99)
        lora_linear(*forward)
    assert [tensor._use_count() for tensor in tensors] == before
