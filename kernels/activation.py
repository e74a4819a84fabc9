"""The activations of a low-rank path and their derivatives, in fp32, chosen by a constexpr name.

The names are those of `pylora.reference.activation.ACTIVATIONS`. tanh is computed from exp because
Triton's interpreter has no tanh; erf is Triton's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pylora.kernels.precision import rounded

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
# gelu_tanh(h) = h / 2 (1 + tanh(_TANH_SCALE (h + _CUBIC h^3))), arXiv:1606.08415
_TANH_SCALE = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(h):
    return 1.0 / (1.0 + tl.exp(-h))


@triton.jit
def _tanh(h):
    # exp(-2 |h|) cannot overflow. Near zero the quotient loses digits by cancellation; an odd
    # polynomial with a relative error below 2^-25 replaces it there.
    small = h * h
    polynomial = 1.0 + small * (
        -0.33333333 + small * (0.13333333 + small * (-0.053968254 + small * 0.021869488))
    )
    decay = tl.exp(-2.0 * tl.abs(h))
    quotient = (1.0 - decay) / (1.0 + decay)
    quotient = tl.where(h < 0.0, -quotient, quotient)
    return tl.where(small < 0.0225, h * polynomial, quotient)


# A constexpr must stand to the right of a tensor: if it stood to the left, the interpreter would
# make the product a constexpr too.
@triton.jit
def _gelu_argument(h):
    return (h + h * h * h * _CUBIC) * _TANH_SCALE


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """Returns act(h) in fp32."""
    if ACTIVATION == "relu":
        # NaN stays NaN in this form, as it does in torch.
        h = tl.where(h < 0.0, 0.0, h)
    elif ACTIVATION == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        h = 0.5 * h * (1.0 + _tanh(_gelu_argument(h)))
    elif ACTIVATION == "silu":
        h = h * _sigmoid(h)
    elif ACTIVATION == "tanh":
        h = _tanh(h)
    elif ACTIVATION == "sigmoid":
        h = _sigmoid(h)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return h


@triton.jit
def activate_backward(grad, h, ACTIVATION: tl.constexpr):
    """Returns grad * act'(h) in fp32."""
    if ACTIVATION == "relu":
        grad = tl.where(h <= 0.0, 0.0, grad)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
        pdf = tl.exp(-0.5 * h * h) * _INVERSE_SQRT_2PI
        grad = grad * (cdf + h * pdf)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(_gelu_argument(h))
        inner = (1.0 + h * h * (3.0 * _CUBIC)) * _TANH_SCALE
        grad = grad * (0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * inner)
    elif ACTIVATION == "silu":
        s = _sigmoid(h)
        grad = grad * (s * (1.0 + h * (1.0 - s)))
    elif ACTIVATION == "tanh":
        t = _tanh(h)
        grad = grad * (1.0 - t * t)
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(h)
        grad = grad * (s * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "identity")
    return grad


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """Returns act(gate) * up, the input of a gated MLP's down projection.

    The product is computed in fp32 and rounded once to the dtype of gate.
    """
    return rounded(activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32), gate.dtype)
