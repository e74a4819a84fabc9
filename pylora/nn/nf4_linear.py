"""`NF4Linear`: a linear layer with its weight in NF4 and the state dict of bitsandbytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pylora import bnb_format, checks, functional
from pylora.nf4 import (
    DEFAULT_BLOCKSIZE,
    DEFAULT_NESTED_BLOCKSIZE,
    absmax_shape,
    block_count,
    check_blocksize,
    packed_shape,
)
from pylora.nf4_weight import NF4Weight
from pylora.nn.kept import Kept, Place, places_of
from pylora.ops import run

_TENSORS = ("weight", "absmax", "nested_absmax", "nested_code", "offset", "bias")


class NF4Linear(nn.Module):
    """y = x @ W^T + bias with W [out_features, in_features] in NF4 and frozen.

    in_features, out_features    sizes, >= 0
    bias                         true for a bias [out_features]
    blocksize, double_quant      as in `pylora.quantize_nf4`
    device, dtype                as in nn.Linear; dtype is that of the bias and of the weight before
                                 it is quantized

    forward(x [..., in_features]) computes in x.dtype and returns [..., out_features]. `weight`
    holds the packed bytes; its dim 0 is out_features if in_features % blocksize == 0. The state
    dict has the keys and shapes of bitsandbytes. `.to(dtype)` and `.half()` change the bias alone.
    Source: QLoRA, arXiv:2305.14314.
    """

    bias: nn.Parameter | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        blocksize: int = DEFAULT_BLOCKSIZE,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._kept: Kept | None = None
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            checks.integer(name, value, least=0)
        check_blocksize(blocksize)
        self.in_features, self.out_features = in_features, out_features
        self.blocksize, self.double_quant = blocksize, double_quant
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.nested_blocksize = DEFAULT_NESTED_BLOCKSIZE
        self._allocate(torch.device("meta"))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if torch.device(device or torch.get_default_device()).type == "meta":
            return
        self._initialize(device)

    def _initialize(self, device: torch.device | str | None) -> None:
        """Initializes as nn.Linear does, and quantizes the weight."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        weight = torch.empty(
            self.out_features, self.in_features, device=device, dtype=self.weight_dtype
        )
        nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.set_nf4_weight(functional.quantize_nf4(weight, self.blocksize, self.double_quant))

    def _allocate(self, device: torch.device) -> None:
        """Sets empty tensors of the right shapes, so that meta models and FSDP know them."""
        shape = (self.out_features, self.in_features)
        blocks = block_count(self.out_features * self.in_features, self.blocksize)
        nested: dict[str, Any] = {}
        if self.double_quant:
            groups = block_count(blocks, self.nested_blocksize)
            nested = {
                "nested_absmax": torch.empty(groups, dtype=torch.float32, device=device),
                "nested_code": torch.empty(256, dtype=torch.float32, device=device),
                "offset": torch.empty((), dtype=torch.float32, device=device),
            }
        self.set_nf4_weight(
            NF4Weight(
                torch.empty(packed_shape(shape, self.blocksize), dtype=torch.uint8, device=device),
                torch.empty(
                    absmax_shape(shape, self.blocksize),
                    dtype=torch.uint8 if self.double_quant else torch.float32,
                    device=device,
                ),
                torch.Size(shape),
                self.weight_dtype,
                self.blocksize,
                **nested,
                nested_blocksize=self.nested_blocksize,
            )
        )

    @property
    def nf4_weight(self) -> NF4Weight:
        """The quantized weight; it shares the tensors of this layer."""
        return NF4Weight(
            self.weight,
            self.absmax,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.blocksize,
            self.nested_absmax,
            self.nested_code,
            self.offset,
            self.nested_blocksize,
        )

    def set_nf4_weight(self, w: NF4Weight) -> None:
        """Replaces the quantized weight by one of the same shape; its tensors are shared, not
        copied.

        Raises ValueError for another shape.
        """
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"w has shape {tuple(w.shape)}; it must be {(self.out_features, self.in_features)}"
            )
        self._kept = None
        # The parameters of another layer are shared as objects: a copy, a cast and a count of
        # parameters then see that they are the same.
        self.weight, self.absmax = frozen(w.qweight), frozen(w.absmax)
        self.register_buffer("nested_absmax", w.nested_absmax, persistent=False)
        self.register_buffer("nested_code", w.nested_code, persistent=False)
        self.register_buffer("offset", w.offset, persistent=False)
        self.blocksize, self.nested_blocksize = w.blocksize, w.nested_blocksize
        self.double_quant, self.weight_dtype = w.double_quant, w.dtype

    def forward(self, x: Tensor) -> Tensor:
        kept = self._kept
        if kept is None or torch.compiler.is_compiling():
            return self._checked_forward(x)
        call = kept.call_with(x)
        return self._checked_forward(x) if call is None else call.run(x)

    def _checked_forward(self, x: Tensor) -> Tensor:
        call = functional.CALLS["nf4_linear"](x, self.nf4_weight, self.bias)
        if not torch.compiler.is_compiling():
            self._kept = Kept.of(self.places(), x, call)
        return run(call)

    def places(self) -> tuple[Place, ...] | None:
        """Where this layer holds the tensors that a call reads."""
        return places_of(self, _TENSORS)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = False
    ) -> NF4Linear:
        """Quantizes the weight of an nn.Linear; the bias is shared.

        Raises TypeError for another module, and whatever `pylora.quantize_nf4` raises.
        """
        if not isinstance(linear, nn.Linear) or hasattr(linear.weight, "quant_state"):
            raise TypeError(f"linear is {type(linear).__name__}; it must be a dense nn.Linear")
        return cls._around(
            functional.quantize_nf4(linear.weight, blocksize, double_quant), linear.bias
        )

    @classmethod
    def from_bitsandbytes(cls, linear4bit: nn.Module) -> NF4Linear:
        """Takes over a bitsandbytes Linear4bit (nf4): the same bytes, shared, and its bias.

        Raises TypeError or ValueError as `NF4Weight.from_bitsandbytes` does.
        """
        bias = getattr(linear4bit, "bias", None)
        return cls._around(NF4Weight.from_bitsandbytes(linear4bit), bias)

    @classmethod
    def _around(cls, w: NF4Weight, bias: nn.Parameter | None) -> NF4Linear:
        layer = cls(
            w.in_features,
            w.out_features,
            False,
            w.blocksize,
            w.double_quant,
            device="meta",
            dtype=w.dtype,
        )
        layer.set_nf4_weight(w)
        layer.bias = bias
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # A cast to 16 bits is meant for activations and biases; absmax in 16 bits would change the
        # weight.
        scales = {
            id(tensor)
            for tensor in (self.absmax, self.nested_absmax, self.nested_code, self.offset)
            if tensor is not None
        }

        def keep_scale_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in scales and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_scale_dtype, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # bitsandbytes writes the weight, the bias, and then the entries that describe the weight.
        weight = self.weight if keep_vars else self.weight.detach()
        destination[prefix + "weight"] = weight.view(-1, 1)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for name, entry in bnb_format.state_entries(self.nf4_weight).items():
            destination[f"{prefix}weight.{name}"] = entry if keep_vars else entry.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {prefix + "weight", prefix + "bias"}
        entries = {}
        for name in bnb_format.ENTRY_NAMES:
            key = f"{prefix}weight.{name}"
            if key in state_dict:
                entries[name] = state_dict[key]
                known.add(key)
        if strict:
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in known
            ]
        bias = state_dict.get(prefix + "bias")
        if self.bias is None and bias is not None and strict:
            unexpected_keys.append(prefix + "bias")
        if self.bias is not None and bias is None:
            missing_keys.append(prefix + "bias")
        if prefix + "weight" not in state_dict:
            missing_keys.append(prefix + "weight")
            return
        try:
            w = self._read_weight(state_dict[prefix + "weight"], entries)
            if self.bias is not None and bias is not None:
                self._load_bias(bias)
            self.set_nf4_weight(w)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")

    def _load_bias(self, bias: Tensor) -> None:
        assert self.bias is not None
        if tuple(bias.shape) != tuple(self.bias.shape):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; it must be {tuple(self.bias.shape)}"
            )
        if self.bias.is_meta:
            self.bias = nn.Parameter(bias.detach(), requires_grad=self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(bias)

    def _read_weight(self, weight: Tensor, entries: dict[str, Tensor]) -> NF4Weight:
        """The stored weight on this layer's device; a dense weight is quantized."""
        if entries:
            w = NF4Weight(**bnb_format.read_state_entries(weight, entries))
        else:
            w = functional.quantize_nf4(weight, self.blocksize, self.double_quant)
        shape = (self.out_features, self.in_features)
        if tuple(w.shape) != shape:
            raise ValueError(f"weight has shape {tuple(w.shape)}; it must be {shape}")
        device = self.weight.device
        if device.type == "meta":
            return w
        # The tensors are copied: the layer must not change if the caller's state dict does.
        return w.map_tensors(lambda tensor: tensor.to(device, copy=True))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """The tensor itself if it is a parameter already, else a parameter without grad over it."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
