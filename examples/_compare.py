"""Comparisons: the adapter reloaded by PEFT, and `--compare`, which runs every method on the same
job.

`--compare` gives each method its own process, so that no method's memory contains what another
method left behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _data import IGNORED, load_examples
from _model import bundled_model, load_model
from _options import METHODS, NF4_METHODS, OPTIONS, UserError, flag
from torch import nn

MIB = 2**20
COLORS = dict(zip(METHODS, ("#2563eb", "#0d9488", "#9333ea", "#d97706", "#6b7280"), strict=True))

# --- PEFT + bitsandbytes --------------------------------------------------------------------------


def load_bitsandbytes_model(
    folder: Path, dtype: torch.dtype, device: torch.device, skipped: Sequence[str] = ()
) -> Any:
    """Loads the NF4 base as bitsandbytes makes it: double quantization, blocks of 64."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *skipped],
    )
    model = load_model(folder, dtype, device, quantization_config=config)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The first call in eval mode repacks the weight on some CPUs, for good and in a form
            # that cannot be trained over. Nothing else in this layer depends on the mode.
            module.train()
            module.train = lambda mode=True, module=module: module
    return model


def load_peft_model(
    folder: Path, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> tuple[Any, int]:
    """Returns the same QLoRA model, made by PEFT, and the number of parameters of its base."""
    from peft import LoraConfig, get_peft_model

    base = load_bitsandbytes_model(folder, dtype, device)
    parameters = base.num_parameters()
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config), parameters


@torch.no_grad()
def completion_logits(
    model: nn.Module, batches: Sequence[dict[str, Any]], dtype: torch.dtype
) -> torch.Tensor:
    """Returns the logits that predict the tokens of the completions, in float64."""
    model.eval()
    device = next(model.parameters()).device
    kept_logits = []
    for batch in batches:
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        wanted = inputs.pop("labels")[:, 1:] != IGNORED
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits
        kept_logits.append(logits[:, :-1][wanted].double().cpu())
    return torch.cat(kept_logits)


def check_with_peft(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    adapter: Path,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Compares the logits of `model` with those of PEFT, which loads the adapter from its file.

    Two programs that compute in the same dtype differ in their last bits, so neither can judge the
    other. Both are compared with PEFT over the dequantized base in a finer dtype. The error of
    `model` must be at most twice that of PEFT + bitsandbytes, plus one rounding unit.
    """
    if options.method in ("full", "peft"):
        return {"skipped": f"--method {options.method} has no adapter of pylora"}
    nf4 = options.method in NF4_METHODS
    absent = [p for p in ("peft", "bitsandbytes")[: 1 + nf4] if importlib.util.find_spec(p) is None]
    if absent:
        return {"skipped": f"{' and '.join(absent)} not installed"}
    from peft import PeftModel

    print("Reloading the adapter through PEFT ...", flush=True)
    finer = torch.float32 if dtype == torch.bfloat16 else torch.float64
    kept = json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] or ()

    def load_base(dtype: torch.dtype) -> Any:
        if nf4:
            return load_bitsandbytes_model(folder, dtype, device, kept)
        return load_model(folder, dtype, device)

    ours = completion_logits(model, batches, dtype)
    theirs = completion_logits(PeftModel.from_pretrained(load_base(dtype), adapter), batches, dtype)
    base = load_base(torch.float32)  # holds the bf16 weights exactly, so NF4 is the same
    base = base.dequantize() if nf4 else base
    reference = PeftModel.from_pretrained(base, adapter).to(finer)
    exact = completion_logits(reference, batches, finer)

    unit = torch.finfo(dtype).eps * exact.abs().max().item()
    result: dict[str, Any] = {"tokens": len(exact), "rounding_unit": unit}
    for name, logits in (("pylora", ours), ("peft", theirs)):
        error = logits - exact
        result[name] = {
            "max_error": error.abs().max().item(),
            "rms_error": error.square().mean().sqrt().item(),
            "same_best_token": (logits.argmax(1) == exact.argmax(1)).double().mean().item(),
        }
    result["agrees"] = all(
        result["pylora"][key] <= 2 * result["peft"][key] + unit
        for key in ("max_error", "rms_error")
    )
    return result


# --- every method on the same job -----------------------------------------------------------------


def compare(options: argparse.Namespace) -> int:
    load_examples(options.data)  # a bad file should fail here, not in the first child
    options.model = options.model or bundled_model()
    print(f"Training {options.steps} steps by each of {len(METHODS)} methods.", flush=True)
    results = []
    for method in METHODS:
        print(f"\n{method}", flush=True)
        results.append(run_method(options, method, options.out / "compare" / method))

    from _report import print_table, write_json

    header, rows = table(results)
    print()
    print_table(header, rows)
    kernels = next((result["kernels"] for result in results if result["kernels"]), "none")
    print(
        f"\n  peft is qlora through PEFT + bitsandbytes; the others run on pylora ({kernels}).\n"
        "  peak is the memory of the process in training; the next column subtracts what the\n"
        "  imported libraries take.\n"
    )
    picture, summary = options.out / "comparison.png", options.out / "comparison.json"
    title = f"{results[0]['model']}, {options.steps} steps of {options.batch_size} examples"
    save_comparison(picture, results, title)
    write_json(summary, {"header": header, "rows": rows, "runs": results})
    print(f"  {picture}  curves and bars\n  {summary}  every number")
    return 0


def run_method(options: argparse.Namespace, method: str, out: Path) -> dict[str, Any]:
    """Runs one method and returns its summary.

    Its progress bar goes to the console, and the rest of its output into log.txt.
    """
    command = [sys.executable, str(Path(__file__).with_name("finetune_qlora.py")), "--no-check"]
    chosen = {**vars(options), "method": method, "out": out, "samples": 0, "save_every": 0}
    if method != "hybrid":
        chosen["full_modules"] = ()
    for name, _, _ in OPTIONS:
        value = chosen.get(name)
        if value not in (None, (), []):
            values = value if isinstance(value, list) else [value]
            command += [flag(name), *map(str, values)]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with log.open("w") as stream:
        status = subprocess.run(command, stdout=stream, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"--method {method} failed with status {status}, its output is in {log}")
    result: dict[str, Any] = json.loads((out / "summary.json").read_text("utf-8"))
    return result


def table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = {
        "method": lambda r: r["method"],
        "trained": lambda r: f"{r['trained_parameters'] / 1e6:.2f} M",
        "frozen MiB": lambda r: f"{r['frozen_bytes'] / MIB:.0f}",
        "peak MiB": lambda r: f"{r['memory_bytes']['peak'] / MIB:.0f}",
        "above libraries": lambda r: f"{own_memory(r):.0f}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
        "loss before": lambda r: f"{r['before']['loss']:.3f}",
        "loss after": lambda r: f"{r['after']['loss']:.3f}",
        "perplexity": lambda r: f"{r['after']['perplexity']:.1f}",
    }
    return tuple(columns), [tuple(cell(r) for cell in columns.values()) for r in results]


def own_memory(result: dict[str, Any]) -> float:
    """Returns the MiB at the peak of training, without the memory of the imported libraries."""
    return (result["memory_bytes"]["peak"] - result["memory_bytes"]["libraries"]) / MIB


def save_comparison(path: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Draws the training curves, and one bar for each method's loss, memory and speed."""
    from _report import INK, plain_frame, pyplot, save_figure, smoothed

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7), dpi=120, layout="constrained")
    curves, *bars = grid.flat
    methods = [result["method"] for result in results]
    for result in results:
        curves.plot(
            range(1, len(result["losses"]) + 1),
            smoothed(result["losses"]),
            color=COLORS[result["method"]],
            linestyle="--" if result["method"] == "peft" else "-",
            label=result["method"],
            linewidth=1.8,
        )
    curves.set(title="Training loss, smoothed", xlabel="step")
    curves.legend(frameon=False)
    plain_frame(curves)
    for axes, heading, form, value in (
        (bars[0], "Validation loss after training", "{:.3f}", lambda r: r["after"]["loss"]),
        (bars[1], "Peak memory above the libraries, MiB", "{:.0f}", own_memory),
        (bars[2], "Tokens per second in training", "{:.0f}", lambda r: r["tokens_per_second"]),
    ):
        values = [value(result) for result in results]
        drawn = axes.barh(methods, values, color=[COLORS[m] for m in methods], height=0.65)
        axes.bar_label(drawn, labels=[form.format(v) for v in values], padding=4, color=INK)
        axes.invert_yaxis()
        axes.set_title(heading)
        axes.margins(x=0.15)
        plain_frame(axes)
        axes.grid(axis="y", visible=False)
    figure.suptitle(title, color=INK)
    save_figure(figure, path)
