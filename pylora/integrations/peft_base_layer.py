"""`PeftNF4Linear`: an NF4Linear that PEFT takes for an nn.Linear while it is a base layer of PEFT.

PEFT's methods ask for an `nn.Linear` by class, and most of them read its `weight` as a matrix of
numbers; some write it. So the layer is both: an NF4Linear for pylora and for torch, with the packed
codes as its parameter, and an nn.Linear whose attribute `weight` is the dense weight. What PEFT
writes is quantized again, with the layer's own blocksize and double quantization.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pylora.functional import quantize_nf4
from pylora.models.merging import MergedLayer, loss_of
from pylora.nn import NF4Linear
from pylora.nn.nf4_linear import BYTES, frozen, stored_tensors
from pylora.sharding import is_sharded

logger = logging.getLogger(__name__)

# What `peft_install` has replaced: the class, the name of a method, and the method as PEFT has it.
replaced_methods: list[tuple[type, str, Any]] = []


class _Dense:
    """The dense weight of a layer for as long as PEFT may write it; made when it is first read."""

    def __init__(self, layer: PeftNF4Linear, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype
        self.written: Any = None

    @property
    def weight(self) -> Any:
        if self.written is None:
            self.written = self._layer.dense_weight(self._dtype)
        return self.written


@dataclass
class BeforeMerge:
    """What a layer had before PEFT merged adapters into it.

    stored    the parameters that hold the weight, by name
    bias      a copy of the bias
    layers    how many layers of PEFT, one around the other, are merged
    loss      what rounding lost; its name is empty
    """

    stored: dict[str, nn.Parameter | None]
    bias: Tensor | None
    layers: int
    loss: MergedLayer


class PeftNF4Linear(NF4Linear, nn.Linear):  # type: ignore[misc]
    """An NF4Linear with the interface of an nn.Linear; `take` and `give_back` change the class.

    weight    the dense weight in `weight_dtype`, made anew at each access; to assign a dense weight
              quantizes it. `packed_weight`, `named_parameters()` and `state_dict()` have the codes.
              While `fully_shard` holds the codes in parts, it is these.
    """

    # Class attributes, so that a layer whose class has just been changed has them as well.
    _dense: _Dense | None = None
    before_merge: BeforeMerge | None = None

    @property
    def is_written(self) -> bool:
        """True while PEFT may write the dense weight."""
        return self._dense is not None

    @property
    def packed_weight(self) -> nn.Parameter:
        """The packed codes."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The dense weight [out_features, in_features]."""
        if self._dense is not None:
            return self._dense.weight
        if is_sharded(self.packed_weight):  # fully_shard asks for its own parameter
            return self.packed_weight
        return self.dense_weight(self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not isinstance(value, Tensor):
            super().__setattr__(name, value)
        elif value.dtype == torch.uint8:
            self._put({"weight": frozen(value)})
        elif self._dense is not None:
            self._dense.written = value
        else:
            self.quantize(value)

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype) -> Any:
        """A dense copy of the weight.

        Raises RuntimeError if PEFT has been given its own methods back, which would lose what they
        write into the copy.
        """
        if not replaced_methods:
            raise RuntimeError(
                "this NF4 layer has adapters of PEFT, which needs its dense weight, and "
                "pylora.integrations.peft.uninstall() was called: call install() again"
            )
        if torch.compiler.is_compiling():  # it cannot trace how a parameter is made
            return self.nf4_weight.dequantize(dtype)
        with torch.inference_mode(False):
            return nn.Parameter(self.nf4_weight.dequantize(dtype), requires_grad=False)

    def reset_parameters(self) -> None:
        """Initializes the layer anew, as nn.Linear does."""
        self._initialize(self.packed_weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The dense weight follows casts, as that of a dense layer does.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        if self.before_merge is not None:
            for parameter in self.before_merge.stored.values():
                if parameter is not None:
                    parameter.data = fn(parameter.data)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def quantize(self, dense: Tensor) -> MergedLayer | None:
        """Takes the values of `dense`; returns what rounding lost, or None if nothing changed."""
        if self.packed_weight.is_meta:
            return None
        old = self.nf4_weight
        dense = dense.detach()
        if dense.shape == old.shape and torch.equal(dense, old.dequantize(dense.dtype)):
            return None
        exact = dense.float()
        new = quantize_nf4(exact, old.blocksize, old.double_quant)
        tensors = stored_tensors(self._checked(new))
        self._put({name: frozen(tensors[name]) if name in tensors else None for name in BYTES})
        return loss_of("", old, new, exact)

    def stored(self) -> dict[str, nn.Parameter | None]:
        """The parameters that hold the weight, by name."""
        return {name: self._parameters[name] for name in BYTES}

    def put_back(self, stored: dict[str, nn.Parameter | None], bias: Tensor | None) -> None:
        """Gives the layer what `stored` returned before, and the values of its bias."""
        self._put(stored)
        if self.bias is not None and bias is not None:
            self.bias.data = bias.to(self.bias.device, self.bias.dtype, copy=True)

    def _put(self, stored: dict[str, nn.Parameter | None]) -> None:
        # Not register_parameter: PEFT replaces it by one that moves everything to "meta".
        self._kept = None
        self._parameters.update(stored)


def take(layer: NF4Linear) -> None:
    """Lets PEFT take the layer for an nn.Linear, in place."""
    layer.__class__ = PeftNF4Linear


def give_back(layer: PeftNF4Linear) -> None:
    """Makes the layer an NF4Linear again, with the weight that it has now."""
    vars(layer).pop("before_merge", None)
    layer.__class__ = NF4Linear  # type: ignore[assignment]


@contextmanager
def writable(layer: PeftNF4Linear) -> Iterator[None]:
    """Within the block, PEFT may write the dense weight; at its end it is quantized again."""
    if layer._dense is not None:
        yield
        return
    with _dense(layer, layer.weight_dtype) as dense:
        yield
        loss = None if dense.written is None else layer.quantize(dense.written)
    if loss is not None:
        logger.warning(
            "PEFT's initialization changed the weight of an NF4 layer, and rounding it to NF4 lost "
            "%.2f %% of the change",
            100 * loss.error_of_delta,
        )


@contextmanager
def _dense(layer: PeftNF4Linear, dtype: torch.dtype) -> Iterator[_Dense]:
    if is_sharded(layer.packed_weight):
        raise RuntimeError(
            "the codes of this NF4 layer are sharded; PEFT can add adapters to it and merge them "
            "only before fully_shard"
        )
    dense = _Dense(layer, dtype)
    vars(layer)["_dense"] = dense
    try:
        yield dense
    finally:
        del vars(layer)["_dense"]


@torch.no_grad()
def merge(layer: PeftNF4Linear, peft_layer: Any, own: Callable[[list[str]], None]) -> None:
    """Calls `own(adapter_names)`, PEFT's merge into the layer, and quantizes what it writes.

    own    merges what it is given; adapters that were merged before are merged again with it, from
           the weight before all merges, so that the sum is rounded only once

    Raises ValueError if a merged weight is not finite; everything is then as it was.
    """
    before, merged = layer.before_merge, list(peft_layer.merged_adapters)
    stored, bias = layer.stored(), _copy(layer.bias)
    try:
        if before is not None and merged and before.layers == 1:
            layer.put_back(before.stored, before.bias)
            peft_layer.merged_adapters.clear()
            own_names = merged
        else:
            own_names = []
        with _dense(layer, torch.float32) as dense:
            own(own_names)
            if layer.bias is not None and bias is not None:  # PEFT may give it the weight's dtype
                layer.bias.data = layer.bias.data.to(bias.dtype)
            loss = None if dense.written is None else layer.quantize(dense.written)
    except BaseException:  # an interrupt, too, must not leave half of a layer merged
        peft_layer.merged_adapters[:] = merged
        layer.put_back(stored, bias)
        raise
    if not peft_layer.merged_adapters:
        return
    if loss is None:  # no delta
        dense_weight = layer.nf4_weight.dequantize(torch.float32)
        loss = loss_of("", dense_weight, dense_weight, dense_weight)
    if before is None:
        layer.before_merge = BeforeMerge(stored, bias, 1, loss)
    else:
        before.layers += not merged
        before.loss = loss


@torch.no_grad()
def unmerge(layer: PeftNF4Linear, peft_layer: Any, own: Callable[[], None]) -> None:
    """Calls `own()`, PEFT's unmerge, and puts the weight back that was there before."""
    before, was_merged = layer.before_merge, peft_layer.merged
    with _dense(layer, torch.float32) as dense:
        own()
    if before is None or not was_merged or peft_layer.merged:
        return
    before.layers -= 1
    if before.layers == 0:
        layer.put_back(before.stored, before.bias)
        del layer.before_merge
    elif dense.written is not None:  # a layer of PEFT around this one or inside it is still merged
        layer.quantize(dense.written)


def _copy(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()
