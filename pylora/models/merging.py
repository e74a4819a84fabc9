"""`merge` writes LoRA into the base weights and reports what rounding lost; `unmerge` undoes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks
from pylora.backends.backend import autocast_off
from pylora.models.dense import dense_linear, make_dense
from pylora.models.distributed import (
    refuse_flat,
    refuse_to_change,
    refuse_to_write,
    settle,
    why_unchangeable,
)
from pylora.models.layer_inputs import inputs_of
from pylora.models.module_tree import Site, adapted_layers, holders, is_below, refuse_peft_model
from pylora.models.unloading import unload
from pylora.models.wrappers import unwrapped
from pylora.nf4_weight import NF4Weight
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.merge_aware import requantized
from pylora.nn.nf4_linear import frozen
from pylora.sharding import is_sharded, whole_parameters


@dataclass(frozen=True)
class MergedLayer:
    """The loss of merging one layer, as Frobenius norms of float32 values, computed in float64.

    name            the name of the layer
    kind            "nf4", or the dtype of a dense weight
    error           |merged - (W + delta)|, which comes from rounding to the format of `kind`
    delta           |delta|, where delta is what LoRA (and DoRA) change in W
    weight          |W + delta|
    output_error    |x (merged - (W + delta))^T|, where the rows of x are the inputs that the layer
                    had in the example of `merge`; None if it had none
    output          |x (W + delta)^T|
    """

    name: str
    kind: str
    error: float
    delta: float
    weight: float
    output_error: float | None = None
    output: float | None = None

    @property
    def error_of_delta(self) -> float:
        """error / delta; it is 1 if rounding changes as much as training did."""
        return _ratio(self.error, self.delta)

    @property
    def error_of_weight(self) -> float:
        """error / weight.

        It is also the error of the output, relative to it, that is expected for inputs with
        uncorrelated features of one size: if E[x^T x] is the identity, E|x D^T|^2 is |D|^2. The
        features in a real model are neither, so `error_of_output` measures it.
        """
        return _ratio(self.error, self.weight)

    @property
    def error_of_output(self) -> float | None:
        """output_error / output: how far this layer alone is off, given the same inputs."""
        if self.output_error is None or self.output is None:
            return None
        return _ratio(self.output_error, self.output)

    def __str__(self) -> str:
        output = self.error_of_output
        return (
            f"{self.name or '(the model)'}  {self.kind}  error {self.error_of_delta:.2%} of delta, "
            f"{self.error_of_weight:.3%} of the weight"
            f"{'' if output is None else f', {output:.3%} of the output'}"
        )


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The loss of every layer that `merge` merged, and the `total` as if they were one layer."""

    layers: tuple[MergedLayer, ...]

    @property
    def total(self) -> MergedLayer:
        """The loss of all layers together."""
        kinds = sorted({layer.kind for layer in self.layers})
        norms: dict[str, Any] = {}
        for name in ("error", "delta", "weight", "output_error", "output"):
            known = [norm for x in self.layers if (norm := getattr(x, name)) is not None]
            norms[name] = math.hypot(*known) if known else None
        return MergedLayer(f"{len(self.layers)} layers", "+".join(kinds), **norms)

    def __repr__(self) -> str:
        rows = sorted(self.layers, key=lambda layer: layer.error_of_delta, reverse=True)
        return "\n".join(["MergeReport", *(f"  {row}" for row in (*rows, self.total))])


def merge(
    model: nn.Module,
    keep_base: bool = True,
    dtype: torch.dtype | None = None,
    example: Any = None,
) -> MergeReport:
    """Writes the LoRA of the active adapter into the base weights, so that it costs no more time.

    model        changed in place
    keep_base    true keeps the base weights as well, so that `unmerge` restores the very same
                 bytes; false frees them at the end and calls `pylora.unload`: the layers are plain
                 ones again, and the model cannot be unmerged
    dtype        float32, bfloat16 or float16 makes every 4-bit layer of the model dense, whether it
                 has LoRA or not: a layer gets dequantize(W4) + delta, which is what was trained,
                 computed in fp32 and rounded once (with merge_aware, which was trained over it,
                 Q(W4 + delta)). It needs keep_base=False. Layers that are dense already keep their
                 dtype. None keeps the format of every layer
    example      inputs on which the model runs once before it is merged, in eval mode, so that the
                 report has the error of each layer's output: the model's keyword arguments in a
                 mapping, its arguments in a tuple or list, or its only argument. The inputs of all
                 layers with LoRA are kept while it runs, so one short batch is best

    A dense base gets W + delta in its dtype. An NF4 base is requantized with its own blocksize and
    double quantization, which may lose a good part of a small delta: the MergeReport that is
    returned says how much, layer by layer. A base weight that is tied to another module is
    replaced, never written to.

    If the model is sharded by `fully_shard`, every process must call this. One layer at a time is
    gathered and merged on all of them, because double quantization has one offset for all rows;
    then each process writes its own rows and keeps only its own rows of the old base.

    A merged model cannot be trained: a backward through a merged layer in training mode raises
    RuntimeError. Raises ValueError if the model has no LoRA, is merged already or has weights on
    the meta device, if a merged weight would not be finite, or if the model is in a wrapper that
    would undo the merge (FSDP1, DeepSpeed, and any sharding if `dtype` is given); the model is then
    as it was.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    refuse_to_write(model, "pylora.merge")
    refuse_flat(model, "pylora.merge")
    if dtype is not None:
        _check_export(model, dtype, keep_base)
    layers = _layers(root)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged already; pylora.unmerge must be called first")
        for parameter in layer.parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{name} has weights on the meta device; they must be loaded before a merge"
                )
    inputs = {} if example is None else inputs_of(root, layers, example)
    settle(root)
    _refuse_shared_parts(root, layers)
    report = []
    done: list[LoRALinear] = []
    try:
        for name, layer in layers.items():
            with whole_parameters(layer):
                merged, facts = _merged(name, layer, dtype, inputs.pop(name, []))
                bias = _merged_bias(name, layer, dtype)
                if isinstance(layer.base_layer, NF4Linear) and isinstance(merged, Tensor):
                    linear: Any = dense_linear(layer.base_layer, dtype, merged)
                    linear.bias = None if bias is None else frozen(bias)
                    layer.set_merged_layer(linear)
                else:
                    layer.set_merged(merged, bias)
            done.append(layer)
            layer.keep_sharded_base()
            report.append(facts)
    except BaseException:  # an interrupt, too, must not leave half of a model merged
        for layer in done:
            layer.unmerge()
        raise
    if not keep_base:
        # Only the caller can put the base of a model that is one layer in its place.
        if isinstance(root, LoRALinear) or why_unchangeable(model, "pylora.unload") is not None:
            for layer in done:
                layer.forget_base()
        else:
            if dtype is not None:
                make_dense(Site("", root), dtype)
            unload(root)
    return MergeReport(tuple(report))


def unmerge(model: nn.Module) -> None:
    """Puts back the base weights that `merge` kept, with the same bytes, however often it is done.

    If the model is sharded by `fully_shard`, every process must call this. Raises ValueError if a
    layer is not merged or its base was not kept; the model is then as it was.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    refuse_to_write(model, "pylora.unmerge")
    refuse_flat(model, "pylora.unmerge")
    layers = _layers(root)
    for name, layer in layers.items():
        if not layer.merged:
            raise ValueError(f"{name} is not merged; pylora.merge must be called first")
        if not layer.can_unmerge:
            raise ValueError(
                f"{name} was merged with keep_base=False; its base weight is gone for good"
            )
    settle(root)
    for layer in layers.values():
        layer.unmerge()


def _refuse_shared_parts(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """Raises ValueError if a merge would write into a sharded weight that another module uses."""
    owners: dict[int, list[str]] | None = None
    for name, layer in layers.items():
        for parameter in layer.base_layer.parameters():
            if not is_sharded(parameter):
                continue
            owners = holders(model) if owners is None else owners
            other = next((o for o in owners[id(parameter)] if not is_below(o, (name,))), None)
            if other is not None:
                raise ValueError(
                    f"{name} shares its sharded base weight with {other}, which the merge would "
                    "change as well; merge it before fully_shard"
                )


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    return layers


def _check_export(model: nn.Module, dtype: torch.dtype, keep_base: bool) -> None:
    """Raises TypeError or ValueError if the 4-bit layers of the model cannot become dense."""
    checks.floating_dtype("dtype", dtype)
    if keep_base:
        raise ValueError(
            f"dtype is {dtype} and keep_base is True; keep_base must be False, because the 4-bit "
            "weights are not kept"
        )
    if isinstance(unwrapped(model), LoRALinear):
        raise ValueError("model is a LoRALinear itself; it must be a module that contains it")
    refuse_to_change(model, "pylora.merge with a dtype")


@torch.no_grad()
def _merged(
    name: str, layer: LoRALinear, dtype: torch.dtype | None, inputs: list[Tensor]
) -> tuple[Tensor | NF4Weight, MergedLayer]:
    """The merged weight of a layer and what rounding it loses.

    dtype     of the dense weight that a 4-bit base becomes; None if it stays one
    inputs    those of the layer in the example
    """
    base = layer.base_weight
    exact = layer.merged_weight()
    bad = int((~exact.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name}: the merged weight has {bad} non-finite elements; all must be finite"
        )
    merged: Tensor | NF4Weight
    if isinstance(base, NF4Weight) and dtype is not None:
        trained = _dense(requantized(base, exact)) if layer.merge_aware else exact
        merged = _rounded(name, trained, dtype)
    elif isinstance(base, NF4Weight):
        merged = requantized(base, exact)
    elif torch.equal(exact, _dense(base)):
        merged = base
    else:
        merged = _rounded(name, exact, base.dtype)
    return merged, loss_of(name, base, merged, exact, inputs)


def loss_of(
    name: str,
    base: Tensor | NF4Weight,
    merged: Tensor | NF4Weight,
    exact: Tensor,
    inputs: Sequence[Tensor] = (),
) -> MergedLayer:
    """What was lost by rounding `exact`, the float32 sum of `base` and a delta, to `merged`.

    inputs    those of the layer in the example
    """
    kind = "nf4" if isinstance(merged, NF4Weight) else str(merged.dtype).removeprefix("torch.")
    error = _dense(merged) - exact
    norms = (_norm(error), _norm(exact - _dense(base)), _norm(exact))
    of_outputs = (_norm_of_outputs(inputs, error), _norm_of_outputs(inputs, exact))
    return MergedLayer(name, kind, *norms, *of_outputs)


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"{name}: the merged weight is too large for {dtype}")
    return rounded


def _norm_of_outputs(inputs: Sequence[Tensor], weight: Tensor) -> float | None:
    """|x weight^T| over the inputs x of a layer; None if it had none."""
    if not inputs:
        return None
    with autocast_off(weight.device.type):
        return math.hypot(*(_norm(nn.functional.linear(x.float(), weight)) for x in inputs))


def _merged_bias(name: str, layer: LoRALinear, dtype: torch.dtype | None) -> Tensor | None:
    """The merged bias of a layer.

    dtype    that of the bias beside a 4-bit base which becomes dense; None if it stays one
    """
    bias = layer.bias
    in_dtype = dtype if isinstance(layer.base_layer, NF4Linear) else None
    low_rank: Tensor | None = layer.lora_B_bias
    if low_rank is None:
        return bias if bias is None or in_dtype is None else bias.detach().to(in_dtype)
    low_rank = layer.scaling * low_rank.detach().float()
    if not low_rank.isfinite().all():
        raise ValueError(f"{name}: lora_B_bias is not finite; all elements must be finite")
    before = _base_dtype(layer) if bias is None else bias.dtype
    low_rank = low_rank if bias is None else bias.detach().float() + low_rank
    return low_rank.to(in_dtype or before)


def _base_dtype(layer: LoRALinear) -> torch.dtype:
    base = layer.base_layer
    return base.weight_dtype if isinstance(base, NF4Linear) else base.weight.dtype


def _dense(weight: Tensor | NF4Weight) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _ratio(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)
