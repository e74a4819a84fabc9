"""The README's table of fine-tuning methods, made from the JSON that `make methods` wrote."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.models.table import MIB

RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-avx2" / "methods.json"
NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "adapter": "bottleneck adapter",
    "qadapter": "adapter over NF4",
    "prompt": "prompt tuning",
    "hybrid": "hybrid",
    "peft": "QLoRA by PEFT + bitsandbytes",
}
# Trained parameters, and quality as a share of that of full fine-tuning.
LITERATURE = {
    "lora": "0.1-1 %, 95-99 %",
    "adapter": "0.5-5 %, 90-97 %",
    "prompt": "< 0.01 %, 85-92 %",
}
HEAD = (
    "| | trained | loss after | above full | gain | published | step, s | peak, MiB "
    "| switch, ms | MB a task |\n|---|---|---|---|---|---|---|---|---|---|\n"
)

Runs = Sequence[Mapping[str, Any]]


def section() -> str:
    """The text between the marks of the README."""
    comparison = json.loads(RESULTS.read_text("utf-8"))
    plan, runs = comparison["plan"], comparison["runs"]
    by_method = {m: [r for r in runs if r["method"] == m] for m in NAMES}
    machine, model = runs[0]["machine"], runs[0]["model"]
    names = ("steps", "batch_size", "validation_examples", "jobs", "threads")
    options = " ".join(f"--{name.replace('_', '-')} {plan[name]}" for name in names)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
    text = (
        f'`make methods OPTIONS="{options}"`: {model} on an {machine["device"]}, '
        f"{runs[0]['compute_dtype']}; {versions}. The loss is that of held-out examples, ± half of "
        f"its range over {plan['seeds']} seeds; it was {_start(by_method['full']):.3f} before. The "
        "gain is the fall of the loss, as a share of that by full fine-tuning. A step is the "
        "median step of the fastest run, since other work of a machine only makes steps longer. "
        "The peak is the memory of a few steps, without the imported libraries. A switch makes "
        "another task active that is in memory; full fine-tuning reads its file."
    )
    if plan["jobs"] > 1:
        text += f" {plan['jobs']} runs shared the machine."
    return f"{textwrap.fill(text, 112, break_on_hyphens=False)}\n\n{HEAD}{''.join(rows(by_method))}"


def rows(by_method: Mapping[str, Runs]) -> Iterator[str]:
    """A row for each method."""
    full = by_method["full"]
    gain_of_full = _start(full) - _mean_loss(full)
    for method, runs in by_method.items():
        losses = [run["after"]["loss"] for run in runs]
        above = [loss - run["after"]["loss"] for loss, run in zip(losses, full, strict=True)]
        gain = (_start(full) - _mean_loss(runs)) / gain_of_full
        share = runs[0]["trained_parameters"] / runs[0]["parameters"]
        cells = (
            NAMES[method],
            f"{runs[0]['trained_parameters'] / 1e6:.2f} M ({share:.2%})",
            f"{_mean_loss(runs):.3f} ± {(max(losses) - min(losses)) / 2:.3f}",
            f"{statistics.mean(above):+.3f}" if method != "full" else "-",
            f"{gain:.0%}",
            LITERATURE.get(method, "-"),
            f"{min(run['step_seconds'] for run in runs):.2f}",
            f"{runs[0]['peak_bytes'] / MIB:.0f}",
            f"{min(run['switch_seconds'] for run in runs) * 1e3:.1f}",
            f"{runs[0]['saved_bytes'] / 1e6:.2f}",
        )
        yield f"| {' | '.join(cells)} |\n"


def _start(runs: Runs) -> float:
    return runs[0]["before"]["loss"]


def _mean_loss(runs: Runs) -> float:
    return statistics.mean(run["after"]["loss"] for run in runs)
