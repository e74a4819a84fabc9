"""Reads and writes NF4 weights as bitsandbytes' parameters and state-dict entries.

The state-dict functions need no bitsandbytes. `read_parameter` and `write_parameter` share the
bytes with its objects; they copy only the small absmax, if its form differs from ours. Weights are
read as the fields of an NF4Weight, and written from an object that has these fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylora.nf4 import (
    DEFAULT_NESTED_BLOCKSIZE,
    NF4_CODE,
    absmax_shape,
    check_blocksize,
    packed_shape,
)

# bitsandbytes' quant_storage: the bytes of the codes, under the name of another dtype.
_STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
_ABSMAX, _CODE = "weight.absmax", "weight.quant_map"
_NESTED_ABSMAX, _NESTED_CODE = "weight.nested_absmax", "weight.nested_quant_map"
# The keys of a layer's state dict that lie beside "weight" and "bias".
ENTRY_KEYS = (_ABSMAX, _CODE, _NESTED_ABSMAX, _NESTED_CODE, STATE_KEY)


class MissingEntry(ValueError):
    """A state dict lacks the entry `key`, which the other parts of a packed weight need."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is missing beside the other parts of a packed weight")
        self.key = key


def read_parameter(source: Any) -> dict[str, Any]:
    """The fields of an NF4Weight that shares the bytes of a bitsandbytes parameter.

    source    a `Linear4bit` or a `Params4bit`

    Raises TypeError for anything else, ValueError if the weight is fp4, not quantized yet, or
    was repacked for bitsandbytes' CPU inference kernel, which cannot be undone without loss.
    """
    param = getattr(source, "weight", source)
    if not isinstance(param, Tensor) or not hasattr(param, "quant_state"):
        raise TypeError(
            f"source is {type(source).__name__}; it must be a bitsandbytes Linear4bit or Params4bit"
        )
    state = param.quant_state
    if state is None:
        state = getattr(source, "quant_state", None)
    if state is None:
        raise ValueError(
            "source is not quantized yet; it must be moved to a device first, "
            "which is when bitsandbytes quantizes"
        )
    if state.quant_type != "nf4":
        raise ValueError(f"source has quant_type {state.quant_type!r}; it must be 'nf4'")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "source was repacked in place by bitsandbytes' CPU inference path, which also rounded "
            "its absmax to bfloat16; it must hold the standard NF4 bytes: load the checkpoint anew"
        )
    nested = state.state2
    return _assemble(
        param.data,
        state.absmax,
        torch.Size(state.shape),
        state.dtype,
        state.blocksize,
        None if nested is None else nested.absmax,
        None if nested is None else nested.code,
        state.offset,
        DEFAULT_NESTED_BLOCKSIZE if nested is None else nested.blocksize,
    )


def write_parameter(w: Any) -> Any:
    """A bitsandbytes `Params4bit` [bytes, 1] that shares the bytes of the NF4Weight `w`.

    Raises ImportError if bitsandbytes is not installed.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    state2 = None
    if w.nested_absmax is not None:
        state2 = QuantState(
            absmax=w.nested_absmax,
            code=w.nested_code,
            blocksize=w.nested_blocksize,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=w.absmax.view(-1),
        shape=w.shape,
        code=_code(w.device),
        blocksize=w.blocksize,
        quant_type="nf4",
        dtype=w.dtype,
        offset=w.offset,
        state2=state2,
    )
    return Params4bit(
        w.qweight.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=w.blocksize,
        compress_statistics=w.double_quant,
        quant_type="nf4",
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )


def state_entries(w: Any) -> dict[str, Tensor]:
    """The entries of a layer's state dict by which bitsandbytes writes the NF4Weight `w`."""
    entries = {
        "weight": w.qweight.reshape(-1, 1),
        _ABSMAX: w.absmax.reshape(-1),
        _CODE: _code(w.device),
    }
    facts = _facts(w.shape, w.dtype, w.blocksize)
    if w.nested_absmax is not None and w.nested_code is not None and w.offset is not None:
        # These are copied, because they may share memory with each other or with other layers, and
        # safetensors refuses tensors that do.
        entries[_NESTED_ABSMAX] = w.nested_absmax.clone()
        entries[_NESTED_CODE] = w.nested_code.clone()
        facts["nested_blocksize"] = w.nested_blocksize
        facts["nested_dtype"] = "float32"
        facts["nested_offset"] = float("nan") if w.offset.is_meta else w.offset.item()
    entries[STATE_KEY] = _as_bytes(facts, w.device)
    return {key: entry.detach() for key, entry in entries.items()}


def description(
    shape: Sequence[int], dtype: torch.dtype, blocksize: int, device: torch.device
) -> Tensor:
    """The JSON by which bitsandbytes describes a weight, as bytes, without its nested_offset."""
    return _as_bytes(_facts(shape, dtype, blocksize), device)


def _facts(shape: Sequence[int], dtype: torch.dtype, blocksize: int) -> dict[str, Any]:
    return {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }


def _as_bytes(facts: dict[str, Any], device: torch.device) -> Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=device)


def read_description(blob: Tensor) -> dict[str, Any]:
    """The facts of a description: shape, dtype, blocksize, nested_blocksize and what else it has.

    Raises ValueError if it is not readable, or if a fact is impossible.
    """
    try:
        facts = json.loads(bytes(blob.cpu().tolist()).decode())
        shape, blocksize = torch.Size(facts["shape"]), int(facts["blocksize"])
        nested_blocksize = int(facts.get("nested_blocksize", DEFAULT_NESTED_BLOCKSIZE))
        dtype = getattr(torch, facts["dtype"])
        quant_type = facts["quant_type"]
        check_blocksize(blocksize)
        if nested_blocksize < 1:
            raise ValueError(f"nested_blocksize is {nested_blocksize}; it must be positive")
        if min(shape, default=0) < 0:
            raise ValueError(f"shape is {list(shape)}; no size may be negative")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype is {facts['dtype']!r}; it must be a floating-point dtype")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{STATE_KEY} is not a readable NF4 description: {error}") from error
    if quant_type != "nf4":
        raise ValueError(f"weight has quant_type {quant_type!r}; it must be 'nf4'")
    return {
        **facts,
        "shape": shape,
        "dtype": dtype,
        "blocksize": blocksize,
        "nested_blocksize": nested_blocksize,
    }


def read_state_entries(entries: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of an NF4Weight, from the entries of a layer's state dict.

    entries    as `state_entries` gives them; the packed codes may be in any storage dtype and any
               shape

    Raises MissingEntry if an entry is missing, and ValueError that names the entry that does not
    fit.
    """
    for key in ("weight", STATE_KEY, _ABSMAX):
        if key not in entries:
            raise MissingEntry(key)
    weight, blob = entries["weight"], entries[STATE_KEY]
    facts = read_description(blob)
    shape, dtype = facts["shape"], facts["dtype"]
    blocksize, nested_blocksize = facts["blocksize"], facts["nested_blocksize"]
    _check_code(entries.get(_CODE))
    nested = _is_nested(entries, facts)
    offset = None
    if nested:
        value = float(facts["nested_offset"])
        offset = torch.tensor(value, dtype=torch.float32, device=weight.device)
    return _assemble(
        weight,
        entries[_ABSMAX],
        shape,
        dtype,
        blocksize,
        entries[_NESTED_ABSMAX] if nested else None,
        entries[_NESTED_CODE] if nested else None,
        offset,
        nested_blocksize,
    )


def _code(device: torch.device) -> Tensor:
    # A new tensor is made each time, because tensors that are written may not share storage.
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


def _check_code(quant_map: Tensor | None) -> None:
    """Raises ValueError if the code is not that of NF4; it would decode to other weights."""
    if quant_map is None or quant_map.is_meta:
        return
    # A checkpoint that was cast as a whole has the code in 16 bits.
    code = _code(quant_map.device).to(quant_map.dtype)
    if not torch.equal(quant_map.reshape(-1), code):
        raise ValueError("weight.quant_map is not the NF4 code; it must be the 16 values of NF4")


def _is_nested(entries: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bool:
    """True if absmax is itself quantized.

    Raises MissingEntry or ValueError if the entries and the description do not agree.
    """
    dtype, described = entries[_ABSMAX].dtype, "nested_offset" in facts
    codes = not dtype.is_floating_point
    if codes and not described:
        raise ValueError(f"{STATE_KEY} has no nested_offset, but {_ABSMAX} is double-quantized")
    if not codes and (described or _NESTED_ABSMAX in entries or _NESTED_CODE in entries):
        raise ValueError(f"{_ABSMAX} has dtype {dtype}; double-quantized it must be uint8")
    for key in (_NESTED_ABSMAX, _NESTED_CODE):
        if codes and key not in entries:
            raise MissingEntry(key)
    return codes


def _assemble(
    packed: Tensor,
    absmax: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    blocksize: int,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> dict[str, Any]:
    if packed.dtype not in _STORAGE_DTYPES:
        raise ValueError(
            f"weight has dtype {packed.dtype}; packed codes must be in uint8, or as bytes in a "
            "floating-point dtype"
        )
    qweight = packed.contiguous().view(-1).view(torch.uint8)
    needed = math.prod(packed_shape(shape, blocksize))
    if not needed <= qweight.numel() < needed + packed.element_size():
        raise ValueError(
            f"weight holds {qweight.numel()} bytes in {packed.dtype}; shape {tuple(shape)} needs "
            f"{needed}"
        )
    if nested_absmax is None and absmax.dtype != torch.float32:
        absmax = absmax.float()
    wanted = absmax_shape(shape, blocksize)
    if absmax.numel() != math.prod(wanted):
        raise ValueError(f"absmax has {absmax.numel()} elements; it must have {math.prod(wanted)}")
    return {
        # A storage dtype wider than a byte pads the bytes; the padding is cut off here.
        "qweight": qweight[:needed].view(packed_shape(shape, blocksize)),
        "absmax": absmax.view(wanted),
        "shape": shape,
        "dtype": dtype,
        "blocksize": blocksize,
        "nested_absmax": nested_absmax,
        "nested_code": nested_code,
        "offset": None if offset is None else offset.reshape(()),
        "nested_blocksize": nested_blocksize,
    }
