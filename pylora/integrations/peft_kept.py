"""Keeps that a call of PEFT's LoRA layer may go through pylora, and with which tensors.

The swap of a layer asks many questions before a call: which adapters are active, if a hook must see
the parts, if the input fits. In a small layer the answers take longer than the products. After a
call that went through pylora, `KeptPeftCall` remembers what the answers depended on, and compares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pylora.calls import Dropout, LowRank
from pylora.dropout import dropout_seed
from pylora.integrations.bitsandbytes_layers import Packed, packed_places
from pylora.integrations.peft_base import Parts, drop_rate
from pylora.integrations.swaps import has_hooks, is_swapped
from pylora.nn import NF4Linear
from pylora.nn.conv1d import is_conv1d
from pylora.nn.kept import Kept, Place

_BY_ADAPTER = ("lora_A", "lora_B", "lora_dropout")


class KeptPeftCall:
    """A call with one plain LoRA adapter, which may be made again with another x.

    module    the layer of PEFT
    name      the adapter, which alone is active in it
    parts     the parts of the adapter
    dtype     that of x
    kept      the checked record
    """

    __slots__ = ("_children", "_dtype", "_kept", "_name", "_of_base", "_parts")

    def __init__(
        self, module: Any, name: str, parts: Parts, dtype: torch.dtype, kept: Kept
    ) -> None:
        self._name, self._parts, self._dtype, self._kept = name, parts, dtype, kept
        self._of_base = Packed.of(parts.base)
        held = module._modules
        self._children = [(held, "base_layer", parts.base)]
        for key in _BY_ADAPTER:
            by_adapter = held[key]._modules
            self._children += [(held, key, held[key]), (by_adapter, name, by_adapter[name])]

    @classmethod
    def of(
        cls, module: Any, name: str, parts: Parts, x: Tensor, record: Any
    ) -> KeptPeftCall | None:
        """What to keep of a call that was made; None if the next one must be checked as well."""
        if module.lora_variant or module.active_adapters != [name]:
            return None
        own = LowRank(parts.A.weight, parts.B.weight, None, parts.B.bias)
        kept = Kept.of(lambda: places_of_parts(parts), x, record, own)
        return None if kept is None else cls(module, name, parts, x.dtype, kept)

    def result(self, module: Any, x: Any) -> Tensor | None:
        """What the layer returns for x; None if the call must be checked first."""
        if module._disable_adapters or module.merged_adapters or module.lora_variant:
            return None
        active = module._active_adapter
        if active != self._name and active != [self._name]:
            return None
        for held, name, child in self._children:
            if held.get(name) is not child:
                return None
        for part in self._parts:
            if has_hooks(part) or ("forward" in part.__dict__ and not is_swapped(part)):
                return None
        if type(x) is not Tensor or x.dtype is not self._dtype:
            return None
        if self._of_base is not None and self._of_base.has_changed():
            return None
        call = self._kept.call_with(x)
        if call is None:
            return None
        p = drop_rate(self._parts.dropout)
        dropout = Dropout(p, dropout_seed(None, x.device)) if p else None
        return call.run(x, module.scaling[self._name], dropout)


def places_of_parts(parts: Parts) -> tuple[Place, ...] | None:
    """The places of the tensors of base, A and B; None if they must not be kept."""
    base = parts.base
    if is_conv1d(base):  # a call reads a view of its weight, which must be taken each time
        return None
    if isinstance(base, NF4Linear):
        of_base = base.places()
        if of_base is None:
            return None
        places = list(of_base)
    else:
        places = list(packed_places(base))
    for layer in (parts.A, parts.B):
        places += [Place(layer._parameters, name) for name in ("weight", "bias")]
    # FSDP, for one, takes the parameters out of a module, and gives it plain tensors in a forward.
    return tuple(places) if all(place.name in place.held for place in places) else None
