"""`merge` writes LoRA into the base weights and reports what rounding lost; `unmerge` undoes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pylora.functional import quantize_nf4
from pylora.models.distributed import (
    refuse_flat,
    refuse_to_write,
    settle,
    why_unchangeable,
)
from pylora.models.module_tree import holders, is_below, lora_layers, refuse_peft_model
from pylora.models.unloading import unload
from pylora.models.wrappers import unwrapped
from pylora.nf4_weight import NF4Weight
from pylora.nn import LoRALinear, NF4Linear
from pylora.sharding import is_sharded, whole_parameters


@dataclass(frozen=True)
class MergedLayer:
    """The loss of merging one layer, as Frobenius norms of float32 values, computed in float64.

    name            the name of the layer
    kind            "nf4", or the dtype of a dense weight
    error           |merged - (W + delta)|, which comes from rounding to the base's format
    delta           |delta|, where delta is what LoRA (and DoRA) change in W
    weight          |W + delta|
    """

    name: str
    kind: str
    error: float
    delta: float
    weight: float

    @property
    def error_of_delta(self) -> float:
        """error / delta; it is 1 if rounding changes as much as training did."""
        return _ratio(self.error, self.delta)

    @property
    def error_of_weight(self) -> float:
        """error / weight."""
        return _ratio(self.error, self.weight)

    def __str__(self) -> str:
        return (
            f"{self.name or '(the model)'}  {self.kind}  error {self.error_of_delta:.2%} of delta, "
            f"{self.error_of_weight:.3%} of the weight"
        )


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The loss of every layer that `merge` merged, and the `total` as if they were one layer."""

    layers: tuple[MergedLayer, ...]

    @property
    def total(self) -> MergedLayer:
        """The loss of all layers together."""
        kinds = sorted({layer.kind for layer in self.layers})
        norms = {
            name: math.hypot(*(getattr(layer, name) for layer in self.layers))
            for name in ("error", "delta", "weight")
        }
        return MergedLayer(f"{len(self.layers)} layers", "+".join(kinds), **norms)

    def __repr__(self) -> str:
        rows = sorted(self.layers, key=lambda layer: layer.error_of_delta, reverse=True)
        return "\n".join(["MergeReport", *(f"  {row}" for row in (*rows, self.total))])


def merge(model: nn.Module, keep_base: bool = True) -> MergeReport:
    """Writes the LoRA of every layer into its base weight, so that it costs no more time.

    model        changed in place
    keep_base    true keeps the base weights as well, so that `unmerge` restores the very same
                 bytes; false frees them at the end and calls `pylora.unload`: the layers are plain
                 ones again, and the model cannot be unmerged

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
    would undo the merge (FSDP1, DeepSpeed); the model is then as it was.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    refuse_to_write(model, "pylora.merge")
    refuse_flat(model, "pylora.merge")
    layers = _layers(root)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged already; pylora.unmerge must be called first")
        for parameter in layer.parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{name} has weights on the meta device; they must be loaded before a merge"
                )
    settle(root)
    _refuse_shared_parts(root, layers)
    report = []
    done: list[LoRALinear] = []
    try:
        for name, layer in layers.items():
            with whole_parameters(layer):
                merged, facts = _merged(name, layer)
                layer.set_merged(merged, _merged_bias(name, layer))
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
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    return layers


@torch.no_grad()
def _merged(name: str, layer: LoRALinear) -> tuple[Tensor | NF4Weight, MergedLayer]:
    base = layer.base_weight
    exact = layer.merged_weight()
    delta = exact - _dense(base)
    bad = int((~exact.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name}: the merged weight has {bad} non-finite elements; all must be finite"
        )
    merged: Tensor | NF4Weight
    if not delta.any():
        merged = base  # nothing was trained; requantizing would only add an error
    elif isinstance(base, NF4Weight):
        merged = replace(quantize_nf4(exact, base.blocksize, base.double_quant), dtype=base.dtype)
    else:
        merged = exact.to(base.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{name}: the merged weight is too large for {base.dtype}")
    return merged, loss_of(name, base, merged, exact)


def loss_of(
    name: str, base: Tensor | NF4Weight, merged: Tensor | NF4Weight, exact: Tensor
) -> MergedLayer:
    """What was lost by rounding `exact`, the float32 sum of `base` and a delta, to `merged`."""
    base_format = "nf4" if isinstance(base, NF4Weight) else str(base.dtype).removeprefix("torch.")
    error, delta = _dense(merged) - exact, exact - _dense(base)
    return MergedLayer(name, base_format, _norm(error), _norm(delta), _norm(exact))


def _merged_bias(name: str, layer: LoRALinear) -> Tensor | None:
    bias = layer.bias
    low_rank: Tensor | None = layer.lora_B_bias
    if low_rank is None:
        return bias
    low_rank = layer.scaling * low_rank.detach().float()
    if not low_rank.isfinite().all():
        raise ValueError(f"{name}: lora_B_bias is not finite; all elements must be finite")
    dtype = _base_dtype(layer) if bias is None else bias.dtype
    return (low_rank if bias is None else bias.detach().float() + low_rank).to(dtype)


def _base_dtype(layer: LoRALinear) -> torch.dtype:
    base = layer.base_layer
    return base.weight_dtype if isinstance(base, NF4Linear) else base.weight.dtype


def _dense(weight: Tensor | NF4Weight) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, NF4Weight) else weight.float()


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _ratio(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else math.inf)
