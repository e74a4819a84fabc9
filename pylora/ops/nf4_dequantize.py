"""torch.ops.pylora.nf4_dequantize: an NF4 weight to a dense tensor of `shape` and `dtype`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.ops.registration import NF4_SCHEMA, register


def _fake(
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return qweight.new_empty(shape, dtype=dtype)


register("nf4_dequantize", f"{NF4_SCHEMA}, SymInt[] shape, ScalarType dtype) -> Tensor", _fake)
