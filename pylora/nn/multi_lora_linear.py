"""`MultiLoRALinear`: a linear layer with a stack of LoRA adapters, one of them for each token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pylora import checks, functional
from pylora.nf4_weight import NF4Weight
from pylora.nn.conv1d import dense_weight, is_conv1d
from pylora.nn.lora_linear import LoRALinear
from pylora.nn.nf4_linear import NF4Linear
from pylora.sharding import refuse_sharded_forward


class MultiLoRALinear(nn.Module):
    """y[m] = base(x[m]) + scaling[i] * lora_B[i] @ lora_A[i] @ x[m], with i = adapter_ids[m].

    base          nn.Linear, NF4Linear, the Conv1D of transformers, or a bitsandbytes Linear4bit
                  (nf4), which becomes an NF4Linear over the same bytes; it is frozen and kept as
                  `base_layer`
    adapters      how many adapters the layer has, >= 1
    r             the rank of all, >= 1
    lora_alpha    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`; a number for
                  all adapters, or a list or tuple with one for each
    dtype         the dtype of the LoRA parameters: float32 by default, as in PEFT

    forward(x [..., in_features], adapter_ids) returns [..., out_features] in x.dtype, in one op.
    adapter_ids is an int64 tensor with an id for each token, or for each x[i]; -1 is the base
    alone. See `pylora.functional.multi_lora_linear`.

    lora_A [adapters, r, in_features] starts Kaiming-uniform and lora_B [adapters, out_features, r]
    at zero, so the layer starts as its base. A backward gives adapters that no token has a gradient
    of zeros. `MultiLoRALinear.of` makes one of the adapters of a LoRALinear.
    Raises TypeError or ValueError that names the argument that does not fit.
    Source: Punica, arXiv:2310.18547; S-LoRA, arXiv:2311.03285.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: int,
        r: int = 8,
        lora_alpha: float | list[float] | tuple[float, ...] = 8,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if hasattr(getattr(base, "weight", None), "quant_state"):
            base = NF4Linear.from_bitsandbytes(base)
        if not isinstance(base, (nn.Linear, NF4Linear)) and not is_conv1d(base):
            raise TypeError(
                f"base is {type(base).__name__}; it must be an nn.Linear, an NF4Linear or a Conv1D"
            )
        checks.plain_weight("base", base)
        checks.integer("adapters", adapters, least=1)
        checks.integer("r", r, least=1)
        checks.floating_dtype("dtype", dtype)
        alphas = lora_alpha if isinstance(lora_alpha, (list, tuple)) else [lora_alpha] * adapters
        if len(alphas) != adapters:
            raise ValueError(
                f"lora_alpha has {len(alphas)} entries; it must have {adapters}, as many as there "
                "are adapters"
            )
        for alpha in alphas:
            checks.number("lora_alpha", alpha)
            if not math.isfinite(alpha):
                raise ValueError(f"lora_alpha is {lora_alpha}; it must be finite")
        self.base_layer: Any = base.requires_grad_(False)
        self.out_features, self.in_features = self.base_weight.shape
        self.scalings = tuple(alpha / (math.sqrt(r) if use_rslora else r) for alpha in alphas)
        self._scalings_tensor: Tensor | None = None
        options: dict[str, Any] = {"device": self.base_weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(adapters, r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(adapters, self.out_features, r, **options))
        self.reset_lora_parameters()

    @classmethod
    def of(cls, layer: LoRALinear, adapter_names: Sequence[str]) -> MultiLoRALinear:
        """The adapters of a LoRALinear in one layer; adapter_ids are places in `adapter_names`.

        The base is shared. The LoRA parameters are copies; those of a lower rank than others are
        padded with zeros. Raises ValueError for a merged layer, and for an adapter that the layer
        does not have, or that has DoRA or a bias, which no other adapter of the batch would have.
        """
        checks.names("adapter_names", adapter_names)
        if isinstance(adapter_names, str) or not adapter_names:
            raise ValueError(f"adapter_names is {adapter_names!r}; it must be a list of names")
        if layer.merged:
            raise ValueError("layer is merged; unmerge must be called first")
        for name in adapter_names:
            if name not in layer.adapter_names:
                raise ValueError(
                    f"adapter_names has {name!r}; the layer has "
                    f"{', '.join(map(repr, layer.adapter_names))}"
                )
        parts = [layer.adapter(name) for name in adapter_names]
        for name, part in zip(adapter_names, parts, strict=True):
            for option, tensor in (("DoRA", part.lora_magnitude), ("a bias", part.lora_B_bias)):
                if tensor is not None:
                    raise ValueError(f"{name!r} has {option}; it must be plain LoRA")
            if part.lora_A.dtype != parts[0].lora_A.dtype:
                raise ValueError(
                    f"{name!r} is in {part.lora_A.dtype}; it must be in {parts[0].lora_A.dtype}, "
                    f"as {adapter_names[0]!r} is"
                )
        rank = max(part.r for part in parts)
        made = cls(layer.base_layer, len(parts), rank, dtype=parts[0].lora_A.dtype)
        made.scalings = tuple(float(part.scaling) for part in parts)
        with torch.no_grad():
            for stack in (made.lora_A, made.lora_B):
                stack.zero_()
            for A, B, part in zip(made.lora_A, made.lora_B, parts, strict=True):
                A[: part.r].copy_(part.lora_A)
                B[:, : part.r].copy_(part.lora_B)
        return made.train(layer.training)

    @property
    def base_weight(self) -> Tensor | NF4Weight:
        """The weight of the base, [out_features, in_features], dense or NF4."""
        base = self.base_layer
        return base.nf4_weight if isinstance(base, NF4Linear) else dense_weight(base)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Sets the start of training: every low-rank path is zero."""
        for A in self.lora_A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        refuse_sharded_forward(self)
        return functional.multi_lora_linear(
            x,
            self.base_weight,
            self.lora_A,
            self.lora_B,
            adapter_ids,
            self._scalings(),
            self.base_layer.bias,
        )

    def _scalings(self) -> Tensor:
        """The scalings on the device of the parameters; no buffer, which a cast would round."""
        kept, A = self._scalings_tensor, self.lora_A
        dtype = torch.promote_types(A.dtype, torch.float32)
        if kept is None or kept.device != A.device or kept.dtype != dtype:
            kept = torch.tensor(self.scalings, dtype=dtype, device=A.device)
            if not torch.compiler.is_compiling():
                self._scalings_tensor = kept
        return kept

    def extra_repr(self) -> str:
        adapters, rank, _ = self.lora_A.shape
        return f"{self.in_features}, {self.out_features}, adapters={adapters}, r={rank}"
