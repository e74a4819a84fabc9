"""The saved adapter, loaded by PEFT over the same NF4 base: are the logits the same?

Two programs that compute in bf16 differ in their last bits, so neither can be the measure of the
other. Both are held against PEFT over the dequantized base in fp32, and the one trained here must
not be further from it than twice as far as PEFT + bitsandbytes, plus one rounding unit.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from _batches import Batch
from _methods import METHODS, LoraOptions, load_base, load_bitsandbytes_base, trained_modules
from _train import CompletionLoss, evaluation_mode
from torch import nn


def missing_library(method: str) -> str | None:
    """Why the comparison cannot be made, or None."""
    if not METHODS[method].adapter or method == "peft":
        return "there is no adapter of ours in it"
    wanted = ("peft", "bitsandbytes") if METHODS[method].nf4_base else ("peft",)
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


@torch.no_grad()
def completion_logits(loss: CompletionLoss, batch: Batch) -> torch.Tensor:
    evaluation_mode(loss.model)
    return loss.logits(batch)[0].float().cpu()


@torch.no_grad()
def compare_with_peft(
    ours: torch.Tensor,
    batch: Batch,
    folder: Path,
    adapter: Path,
    method: str,
    lora: LoraOptions,
    device: torch.device,
) -> dict[str, Any]:
    """`ours`: the logits of the model just trained, for `batch`."""
    from peft import PeftModel

    reference = load_base(folder, torch.float32, device)
    if METHODS[method].nf4_base:
        base = load_bitsandbytes_base(folder, device, trained_modules(reference, method, lora))
        _copy_dequantized(base, reference)
    else:
        base = load_base(folder, torch.bfloat16, device)
    peft_model = PeftModel.from_pretrained(base, adapter)
    theirs = completion_logits(CompletionLoss(peft_model), batch)
    del base, peft_model
    reference_model = PeftModel.from_pretrained(reference, adapter)
    evaluation_mode(reference_model)
    exact = _fp32_logits(reference_model, batch)

    unit = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    result: dict[str, Any] = {"tokens": len(exact)}
    for name, logits in (("pylora", ours), ("peft", theirs)):
        error = logits - exact
        result[name] = {
            "max_error": error.abs().max().item(),
            "rms_error": error.square().mean().sqrt().item(),
            "same_best_token": (logits.argmax(1) == exact.argmax(1)).float().mean().item(),
        }
    result["rounding_unit"] = unit
    result["agrees"] = all(
        result["pylora"][key] <= 2 * result["peft"][key] + unit
        for key in ("max_error", "rms_error")
    )
    return result


def _fp32_logits(model: Any, batch: Batch) -> torch.Tensor:
    batch = batch.to(next(model.parameters()).device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return logits[batch.labels >= 0].float().cpu()


def _copy_dequantized(quantized: nn.Module, dense: nn.Module) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32  # the values as NF4 defines them, not rounded to bf16
            dense.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, state))
            state.dtype = torch.bfloat16
