"""`NF4Linear`: a linear layer with its weight in NF4.

Everything that describes the weight is held as bytes, in uint8. Code that casts a model's floating
point tensors (a loop over the parameters, FSDP2's mixed precision, DeepSpeed) then leaves them as
they are; absmax in 16 bits would be another weight.
"""

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
from pylora.nn.conv1d import dense_weight, is_conv1d
from pylora.nn.kept import Kept, Place, places_of
from pylora.ops import run
from pylora.sharding import refuse_sharded_forward

# What describes the weight.
BYTES = ("weight", "absmax_bytes", "nested_bytes")
_TENSORS = (*BYTES, "bias")
# The parts of nested_bytes: 256 values of nested_code, nested_absmax, and the offset at the end.
_CODE_END, _OFFSET_BEGIN = 256 * 4, -4

# What to call when the first layer of the process is made.
_waiting_for_a_layer: list[Callable[[], None]] = []


def when_first_made(then: Callable[[], None]) -> None:
    """Has `then` called before the first NF4Linear of this process is made or unpickled."""
    _waiting_for_a_layer.append(then)


def _tell_of_first_layer() -> None:
    while _waiting_for_a_layer:
        _waiting_for_a_layer.pop()()


class NF4Linear(nn.Module):
    """y = x @ W^T + bias with W [out_features, in_features] in NF4 and frozen.

    in_features, out_features    sizes, >= 0
    bias                         true for a bias [out_features]
    blocksize, double_quant      as in `pylora.quantize_nf4`
    device, dtype                as in nn.Linear; dtype is that of the bias and of the weight before
                                 it is quantized

    forward(x [..., in_features]) computes in x.dtype and returns [..., out_features].
    `.to(dtype)` and `.half()` change the bias alone, because the rest is held as bytes:

    weight          Parameter, the packed codes: [out_features, in_features / 2] if
                    in_features % blocksize == 0, else flat
    absmax_bytes    Parameter, the fp32 absmax [out_features, in_features / blocksize * 4], or their
                    codes [out_features, in_features / blocksize] under double quantization; flat
                    if `weight` is
    nested_bytes    Parameter, the fp32 nested_code [256], nested_absmax [groups] and offset [1] in
                    one row; None without double quantization
    bias            Parameter or None

    `state_dict()` has these names as keys; that of a layer which is in no model also has
    bitsandbytes' description of the format. `load_state_dict` also takes bitsandbytes' entries,
    which `checkpoint_entries()` gives, and a dense weight, which it quantizes. With strict=False,
    bitsandbytes' entries may come in several calls, as they do from sharded files.
    Source: QLoRA, arXiv:2305.14314.
    """

    bias: nn.Parameter | None
    nested_bytes: nn.Parameter | None

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
        _tell_of_first_layer()
        super().__init__()
        self._kept: Kept | None = None
        self._waiting: dict[str, Tensor] = {}
        # The class of the Conv1D that was quantized: its dense form holds the weight transposed.
        self.conv1d: Any = None
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
    def packed_weight(self) -> nn.Parameter:
        """The packed codes; `weight` itself, except where PEFT reads `weight` as dense."""
        return self.weight

    def _held(self, name: str) -> Any:
        return self.packed_weight if name == "weight" else getattr(self, name)

    @property
    def absmax(self) -> Tensor:
        """The scales of the blocks: fp32, or uint8 codes under double quantization."""
        return self.absmax_bytes if self.double_quant else self.absmax_bytes.view(torch.float32)

    @property
    def nested_code(self) -> Tensor | None:
        """fp32 [256], the values of the absmax codes; None without double quantization."""
        nested = self.nested_bytes
        return None if nested is None else nested[:_CODE_END].view(torch.float32)

    @property
    def nested_absmax(self) -> Tensor | None:
        """fp32 [groups], the scales of the absmax codes; None without double quantization."""
        nested = self.nested_bytes
        return None if nested is None else nested[_CODE_END:_OFFSET_BEGIN].view(torch.float32)

    @property
    def offset(self) -> Tensor | None:
        """fp32 [], the mean of the absmax values; None without double quantization."""
        nested = self.nested_bytes
        return None if nested is None else nested[_OFFSET_BEGIN:].view(torch.float32).view(())

    @property
    def nf4_weight(self) -> NF4Weight:
        """The quantized weight; it shares the memory of this layer."""
        return NF4Weight(
            self.packed_weight,
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
        """Replaces the quantized weight by one of the same shape.

        Its codes and absmax are shared, not copied. Raises ValueError for another shape.
        """
        stored = stored_tensors(self._checked(w))
        self._kept = None
        self.weight = frozen(stored["weight"])
        self.absmax_bytes = frozen(stored["absmax_bytes"])
        nested = stored.get("nested_bytes")
        self.register_parameter("nested_bytes", None if nested is None else frozen(nested))
        self._set_format(w)

    def share_weight(self, other: NF4Linear) -> None:
        """Takes the weight of another layer of the same shape, as the same parameters.

        A copy, a cast and a count of parameters then see that the two layers have one weight.
        """
        w = self._checked(other.nf4_weight)
        self._kept = None
        self.weight, self.absmax_bytes = other.packed_weight, other.absmax_bytes
        self.register_parameter("nested_bytes", other.nested_bytes)
        self._set_format(w)

    def _checked(self, w: NF4Weight) -> NF4Weight:
        shape = (self.out_features, self.in_features)
        if tuple(w.shape) != shape:
            raise ValueError(f"the weight has shape {tuple(w.shape)}; it must be {shape}")
        return w

    def _set_format(self, w: NF4Weight) -> None:
        self.blocksize, self.nested_blocksize = w.blocksize, w.nested_blocksize
        self.double_quant, self.weight_dtype = w.double_quant, w.dtype

    def forward(self, x: Tensor) -> Tensor:
        kept = self._kept
        if kept is None or torch.compiler.is_compiling():
            return self._checked_forward(x)
        call = kept.call_with(x)
        return self._checked_forward(x) if call is None else call.run(x)

    def _checked_forward(self, x: Tensor) -> Tensor:
        refuse_sharded_forward(self)
        call = functional.CALLS["nf4_linear"](x, self.nf4_weight, self.bias)
        if not torch.compiler.is_compiling():
            self._kept = Kept.of(self.places, x, call)
        return run(call)

    def places(self) -> tuple[Place, ...] | None:
        """Where this layer holds the tensors that a call reads."""
        return places_of(self, _TENSORS, viewed=BYTES[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _tell_of_first_layer()
        super().__setstate__(state)

    @classmethod
    def from_linear(
        cls, linear: Any, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = False
    ) -> NF4Linear:
        """Quantizes the weight of an nn.Linear or of transformers' Conv1D; the bias is shared.

        Raises TypeError for another module, and whatever `pylora.quantize_nf4` raises.
        """
        conv1d = is_conv1d(linear)
        dense = isinstance(linear, nn.Linear) and not hasattr(linear.weight, "quant_state")
        if not dense and not conv1d:
            raise TypeError(f"linear is {type(linear).__name__}; it must be a dense nn.Linear")
        checks.plain_weight("linear", linear)
        weight = dense_weight(linear)
        checks.matrix("linear.weight", weight)
        if weight.is_meta:
            out_features, in_features = weight.shape
            options: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
            layer = cls(in_features, out_features, False, blocksize, double_quant, **options)
            layer.bias = linear.bias
        else:
            w = functional.quantize_nf4(weight, blocksize, double_quant)
            layer = cls._around(w, linear.bias)
        layer.conv1d = type(linear) if conv1d else None
        return layer

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

    def checkpoint_entries(self) -> dict[str, Tensor]:
        """The layer's state dict in bitsandbytes' form, as its checkpoints have it.

        Keys: `weight` [bytes, 1], `bias` if there is one, `weight.absmax`, `weight.quant_map`,
        `weight.quant_state.bitsandbytes__nf4`, and two more under double quantization.
        """
        entries = bnb_format.state_entries(self.nf4_weight)
        if self.bias is not None:
            entries["bias"] = self.bias.detach()
        return entries

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not prefix:  # no model around the layer says what its bytes are
            shape = (self.out_features, self.in_features)
            destination[bnb_format.STATE_KEY] = bnb_format.description(
                shape, self.weight_dtype, self.blocksize, self.packed_weight.device
            )

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
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        w, missing = None, list[str]()
        try:
            w = self._take_other_form(own, prefix)
        except bnb_format.MissingEntry as error:
            missing.append(prefix + error.key)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        if w is not None:
            self._take_format(w)
            own.update({prefix + name: value for name, value in stored_tensors(w).items()})
        if self.packed_weight.is_meta:  # there is no memory to copy into
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        names = missing if missing else missing_keys
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, names, unexpected_keys, error_msgs
        )
        if missing:
            own_names = {prefix + name for name in BYTES}
            missing_keys += [name for name in missing if name not in own_names]

    def _take_other_form(self, entries: dict[str, Any], prefix: str) -> NF4Weight | None:
        """Takes a weight in bitsandbytes' form, or a dense one, out of the entries.

        None if the weight has the form of `state_dict`. Raises MissingEntry if only a part of
        bitsandbytes' entries is there, which is kept for a later call; ValueError or TypeError if
        an entry does not fit.
        """
        weight = entries.get(prefix + "weight")
        if prefix + "absmax_bytes" in entries and prefix + bnb_format.STATE_KEY in entries:
            self._check_description(entries.pop(prefix + bnb_format.STATE_KEY))
        keys = [key for key in bnb_format.ENTRY_KEYS if prefix + key in entries]
        packed = {key: entries.pop(prefix + key) for key in keys}
        if weight is not None and (keys or weight.shape != self.packed_weight.shape):
            packed["weight"] = entries.pop(prefix + "weight")
        w = self._read(packed) if packed else None
        for name in _TENSORS:
            if prefix + name in entries:
                self._check_entry(name, entries[prefix + name])
        return w

    def _check_description(self, blob: Tensor) -> None:
        facts = bnb_format.read_description(blob)
        shape = (self.out_features, self.in_features)
        for name, held in (("shape", shape), ("blocksize", self.blocksize)):
            if facts[name] != held:
                raise ValueError(f"the weight has {name} {facts[name]}; it must be {held}")

    def _check_entry(self, name: str, given: Tensor) -> None:
        held = self._held(name)
        if name in BYTES and given.dtype != torch.uint8:
            raise ValueError(f"{name} has dtype {given.dtype}; it must be uint8")
        if held is not None and given.shape != held.shape:
            shapes = f"{tuple(given.shape)}; it must be {tuple(held.shape)}"
            raise ValueError(f"{name} has shape {shapes}")

    def _read(self, packed: dict[str, Tensor]) -> NF4Weight:
        weight = packed.get("weight")
        # bitsandbytes' codes are a column in any storage dtype; anything else is a dense weight.
        if weight is not None and len(packed) == 1 and weight.dim() == 2 and weight.shape[1] > 1:
            return self._checked(functional.quantize_nf4(weight, self.blocksize, self.double_quant))
        try:
            fields = bnb_format.read_state_entries(packed)
        except bnb_format.MissingEntry:
            self._waiting |= packed
            fields = bnb_format.read_state_entries(self._waiting)
        self._waiting = {}
        return self._checked(NF4Weight(**fields))

    def _take_format(self, w: NF4Weight) -> None:
        """Resizes this layer's tensors for the blocksize and double quantization of `w`.

        The parameters stay the same objects: other layers and optimizers may hold them.
        """
        self._kept = None
        self._set_format(w)
        for name, value in stored_tensors(w).items():
            held = self._held(name)
            if held is not None and held.shape == value.shape:
                continue
            sized = torch.empty_like(value, device=self.packed_weight.device)
            if held is None:
                self.register_parameter(name, frozen(sized))
            else:
                held.data = sized
        if not w.double_quant:
            self.register_parameter("nested_bytes", None)

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


def stored_tensors(w: NF4Weight) -> dict[str, Tensor]:
    """The tensors of `w` as an NF4Linear holds them."""
    stored = {"weight": w.qweight, "absmax_bytes": w.absmax.contiguous().view(torch.uint8)}
    if w.nested_absmax is not None and w.nested_code is not None and w.offset is not None:
        parts = (w.nested_code, w.nested_absmax, w.offset.view(1))
        stored["nested_bytes"] = torch.cat(parts).view(torch.uint8)
    return stored
