"""A gated MLP with LoRA on its three projections, in pure PyTorch.

    g, u = gate(x), up(x)                  both are kept for the backward, with the h of each
    y    = down(act(g) * u)                the backward computes act(g) * u again

This is SwiGLU or GEGLU (Shazeer, arXiv:2002.05202) with LoRA (arXiv:2106.09685). Each projection is
a lora_linear; the dropout seeds of gate, up and down are seed, seed + 1 and seed + 2.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pylora.calls import LayerGradients, LoraMlpBackward, LoraMlpCall
from pylora.reference.activation import GATED_ACTIVATIONS
from pylora.reference.lora_linear import REFERENCE_LAYERS, LayerFunctions


def lora_mlp(
    call: LoraMlpCall, run: LayerFunctions = REFERENCE_LAYERS
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(y [..., out_features], gate(x) and up(x) [..., intermediate], the h of each layer).

    run    how each layer runs
    """
    gate_layer, up_layer, down_layer = call.layers
    gate, gate_h = run.forward(call.x, gate_layer)
    up, up_h = run.forward(call.x, up_layer)
    hidden = GATED_ACTIVATIONS[call.activation].forward(gate).mul_(up)
    y, down_h = run.forward(hidden, down_layer)
    return y, gate, up, [gate_h, up_h, down_h]


def lora_mlp_backward(
    call: LoraMlpBackward, run: LayerFunctions = REFERENCE_LAYERS
) -> tuple[Tensor | None, list[LayerGradients]]:
    """(dx, the gradients of gate, up and down).

    dhidden = the gradient of act(g) * u, from the backward of down
    dgate   = dhidden * up * act'(gate)
    dup     = dhidden * act(gate)
    dx      = the sum of the dx of gate and of up
    """
    act = GATED_ACTIVATIONS[call.activation]
    gate_layer, up_layer, down_layer = call.layers
    gate_h, up_h, down_h = call.hs
    wanted_gate, wanted_up, wanted_down = call.wanted
    wants_hidden = wanted_gate.any or wanted_up.any

    activated = act.forward(call.gate)
    hidden = activated * call.up
    wanted_down = replace(wanted_down, x=wants_hidden)
    down = run.backward(call.grad, hidden, down_h, down_layer, wanted_down)
    del hidden
    dhidden, down = down.x, down.with_x(None)
    if dhidden is None:
        return None, [LayerGradients(), LayerGradients(), down]
    dup = dhidden * activated
    del activated
    dgate = act.backward(dhidden.mul_(call.up), call.gate)
    del dhidden
    gate = run.backward(dgate, call.x, gate_h, gate_layer, wanted_gate)
    up = run.backward(dup, call.x, up_h, up_layer, wanted_up)
    dx = gate.x.add_(up.x) if gate.x is not None and up.x is not None else None
    return dx, [gate.with_x(None), up.with_x(None), down]
