"""Comparisons: the adapter reloaded by PEFT, and `--compare`, which runs every method on the same
job.

`--compare` gives each method its own process, so that no method's memory contains what another
method left behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from _data import IGNORED, load_examples
from _methods import load_bitsandbytes_model
from _model import bundled_model, load_model
from _options import (
    ADAPTER_METHODS,
    LASTING,
    METHODS,
    NF4_METHODS,
    OPTIONS,
    PEFT_METHODS,
    UserError,
    flag,
)
from torch import nn

MIB = 2**20
PALETTE = "#d97706 #0d9488 #2563eb #0ea5e9 #84cc16 #be185d #f472b6 #78350f #9333ea #6b7280".split()
COLORS = dict(zip(METHODS, PALETTE, strict=True))

# The parts of each run's summary that comparison.json keeps.
RECORDED = (
    "method model finished learning_rate compute_dtype parameters trained_parameters "
    "frozen_bytes saved_bytes peak_bytes before after losses tokens_per_second step_seconds "
    "switch_seconds kernels machine"
).split()
MEMORY_STEPS = 4
PLANNED = "steps batch_size max_length validation_examples seeds jobs threads".split()

# --- PEFT as a witness ----------------------------------------------------------------------------


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
    if options.method in ("full", *PEFT_METHODS):
        return {"skipped": f"--method {options.method} has no adapter of pylora"}
    if options.method in ADAPTER_METHODS:
        return {"skipped": "PEFT has no bottleneck adapters"}
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
    seeds = range(options.seed, options.seed + options.seeds)
    print(
        f"Training {options.steps} steps by each of {len(METHODS)} methods, "
        f"{len(seeds)} time{'s' * (len(seeds) > 1)}.",
        flush=True,
    )
    # Each seed goes through all methods before the next one, so that a machine which becomes slower
    # does so for every method.
    jobs = [(seed, method) for seed in seeds for method in METHODS]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: run_method(options, *job), jobs))
        memory = list(pool.map(lambda method: run_for_memory(options, method), METHODS))
    by_method = {
        method: [result for result in results if result["method"] == method] for method in METHODS
    }
    for runs, peak in zip(by_method.values(), memory, strict=True):
        for run in runs:
            run["peak_bytes"] = peak
    write_comparison(options, by_method)
    return 0


def write_comparison(
    options: argparse.Namespace, by_method: dict[str, list[dict[str, Any]]]
) -> None:
    """Prints the table; writes it, the numbers and the picture."""
    from _report import print_table, write_json

    header, rows = table(by_method)
    print()
    print_table(header, rows)
    first = next(iter(by_method.values()))[0]
    print(f"\n{explanation(first, options)}\n")
    picture, summary = options.out / "comparison.png", options.out / "comparison.json"
    title = f"{first['model']}, {options.steps} steps of {options.batch_size} examples"
    save_comparison(picture, by_method, title)
    runs = [
        {name: result[name] for name in RECORDED} | {"seed": result["options"]["seed"]}
        for results in by_method.values()
        for result in results
    ]
    plan = {name: getattr(options, name) for name in PLANNED}
    write_json(summary, {"plan": plan, "header": header, "rows": rows, "runs": runs})
    print(f"  {picture}  curves and bars\n  {summary}  every number")


def run_for_memory(options: argparse.Namespace, method: str) -> int:
    """Returns the bytes that a few steps of a method take, without the imported libraries.

    glibc keeps freed tensors of less than some MiB, up to twice what a step needs. In this run it
    gives them back, which takes time, so that the process has no more memory than it uses.
    """
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    few = {"steps": MEMORY_STEPS, "validation_examples": 1, "learning_rate": None}
    result = run_method(options, options.seed, method, "memory", few, {**os.environ, **exact})
    return result["memory_bytes"]["peak"] - result["memory_bytes"]["libraries"]


def run_method(
    options: argparse.Namespace,
    seed: int,
    method: str,
    folder: str = "",
    changes: Mapping[str, Any] = MappingProxyType({}),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs one method and returns its summary; with `--resume`, that of a run which has finished.

    folder         the name of the folder for its output; that of the seed if empty
    changes        options that differ from `options`
    environment    that of the process; this one's if None

    Its output goes into log.txt; its progress bar goes to the console if it runs alone.
    """
    out = options.out / "compare" / (folder or f"seed-{seed}") / method
    script = str(Path(__file__).with_name("finetune_qlora.py"))
    command = [sys.executable, script, "--no-check", "--measure-switch"]
    chosen = {**vars(options), "method": method, "seed": seed, "out": out}
    chosen |= {"seeds": 1, "jobs": 1, "samples": 0, "save_every": 0, **changes}
    if method != "hybrid":
        chosen["full_modules"] = ()
    for name, _, _ in OPTIONS:
        value = chosen.get(name)
        if value not in (None, (), []):
            values = value if isinstance(value, list) else [value]
            command += [flag(name), *map(str, values)]
    summary, log = out / "summary.json", out / "log.txt"
    before = finished_before(summary, chosen) if options.resume else None
    if before is not None:
        print(f"{method}, {out.parent.name}: has finished before", flush=True)
        return before
    print(f"{method}, {out.parent.name} ...", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        errors = None if options.jobs == 1 else stream
        process = subprocess.run(
            command, stdout=stream, stderr=errors, env=environment, check=False
        )
        status = process.returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"--method {method} failed with status {status}, its output is in {log}")
    return json.loads(summary.read_text("utf-8"))


def finished_before(summary: Path, chosen: dict[str, Any]) -> dict[str, Any] | None:
    """Returns this summary if its run has finished and had these options, otherwise None."""
    if not summary.is_file():
        return None
    result = json.loads(summary.read_text("utf-8"))
    given = json.loads(json.dumps(chosen, default=str))
    names = (*LASTING, "model", "data", "threads", "device")
    same = all(given[name] in (None, [], result["options"][name]) for name in names)
    return result if result["finished"] and same else None


def table(
    results: dict[str, list[dict[str, Any]]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and a row for each method."""
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "method": lambda runs: runs[0]["method"],
        "trained": lambda runs: f"{runs[0]['trained_parameters'] / 1e6:.2f} M",
        "share": lambda runs: f"{trained_share(runs):.2%}",
        "frozen MiB": lambda runs: f"{runs[0]['frozen_bytes'] / MIB:.0f}",
        "peak MiB": lambda runs: f"{runs[0]['peak_bytes'] / MIB:.0f}",
        "step s": lambda runs: f"{fastest(runs, 'step_seconds'):.2f}",
        "loss": lambda runs: with_spread([r["after"]["loss"] for r in runs]),
        "above full": lambda runs: above_full(runs, results.get("full")),
        "switch ms": lambda runs: f"{fastest(runs, 'switch_seconds') * 1e3:.2f}",
        "MB a task": lambda runs: f"{runs[0]['saved_bytes'] / 1e6:.2f}",
    }
    return tuple(columns), [
        tuple(cell(runs) for cell in columns.values()) for runs in results.values()
    ]


def explanation(result: dict[str, Any], options: argparse.Namespace) -> str:
    loss = "loss is that of the validation examples after training"
    if options.seeds > 1:
        loss += f": the mean of {options.seeds} seeds, ± half of their range"
    lines = [
        f"{loss}; it was {result['before']['loss']:.3f} before.",
        "above full is its mean distance to full fine-tuning with the same seeds.",
        "peak is the memory of a few steps without the imported libraries.",
        "step is the median step of the fastest run.",
        "switch is the time from one task to another, if both share the base model.",
        "peft is qlora through PEFT and bitsandbytes.",
    ]
    if options.jobs > 1:
        lines.append(f"{options.jobs} runs shared the machine, which makes their steps longer.")
    return "\n".join(f"  {line}" for line in lines)


def fastest(runs: Sequence[dict[str, Any]], name: str) -> float:
    """Returns the least of a time over the seeds: what else a machine does only makes it longer."""
    return min(run[name] for run in runs)


def with_spread(values: Sequence[float]) -> str:
    """Returns the mean, and half of the range if there are several values."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def above_full(runs: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]] | None) -> str:
    """Returns by how much the loss is above that of full fine-tuning, seed by seed."""
    if full is None or full is runs:
        return "-"
    pairs = zip(runs, full, strict=True)
    return f"{statistics.mean(r['after']['loss'] - f['after']['loss'] for r, f in pairs):+.3f}"


def trained_share(runs: Sequence[dict[str, Any]]) -> float:
    return runs[0]["trained_parameters"] / runs[0]["parameters"]


def save_comparison(path: Path, results: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Draws the training curves, and the loss, memory and time of a step of each method."""
    from _report import INK, plain_frame, pyplot, save_figure, smoothed

    figure, grid = pyplot.subplots(2, 2, figsize=(12, 9), dpi=110, layout="constrained")
    curves, losses, memory, times = grid.flat
    for method, runs in results.items():
        means = [statistics.mean(step) for step in zip(*(r["losses"] for r in runs), strict=True)]
        curves.plot(
            range(1, len(means) + 1),
            smoothed(means),
            color=COLORS[method],
            linestyle="--" if method in PEFT_METHODS else "-",
            label=method,
            linewidth=1.8,
        )
    curves.set(title="Training loss, smoothed (AdaLoRA's has its penalty)", xlabel="step")
    curves.legend(frameon=False, ncols=2)
    plain_frame(curves)
    places = range(len(results))
    losses.set_yticks(places, results)
    for place, (method, runs) in zip(places, results.items(), strict=True):
        values = [run["after"]["loss"] for run in runs]
        losses.plot(values, [place] * len(runs), ".", color=COLORS[method], markersize=6)
        losses.plot(statistics.mean(values), place, "|", color=COLORS[method], markersize=18)
        label = f"{statistics.mean(values):.3f}"
        losses.annotate(label, (max(values), place), (8, -4), textcoords="offset points", color=INK)
    losses.set_title("Validation loss after training, each seed and mean")
    for axes, heading, form, values in (
        (
            memory,
            "Peak memory of a step, MiB",
            "{:.0f}",
            [runs[0]["peak_bytes"] / MIB for runs in results.values()],
        ),
        (
            times,
            "Seconds a step, in the fastest run",
            "{:.2f}",
            [fastest(runs, "step_seconds") for runs in results.values()],
        ),
    ):
        drawn = axes.barh(list(results), values, color=[COLORS[m] for m in results], height=0.65)
        axes.bar_label(drawn, labels=[form.format(v) for v in values], padding=4, color=INK)
        axes.set_title(heading)
    for axes in (losses, memory, times):
        axes.invert_yaxis()
        axes.margins(x=0.15)
        plain_frame(axes)
        axes.grid(axis="y", visible=False)
    figure.suptitle(title, color=INK)
    save_figure(figure, path)
