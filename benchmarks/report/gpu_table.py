"""The README's tables with the times of a GPU, made from the committed JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.models import results as models
from benchmarks.models.table import MIB
from benchmarks.report.cuda_goals import DECODED, DENSE, PEFT
from benchmarks.report.tables import (
    device_seconds,
    ratio_to_ours,
    seconds_as_called,
    shape_name,
)
from benchmarks.results import OURS, load, result_of
from benchmarks.timing import EAGER, GRAPH

RESULTS = ROOT / "benchmarks" / "results" / "h100-sxm"
HEAD = (
    "| | M | device, µs | bnb + PEFT | decode + `addmm_` | dense, no LoRA "
    "| called, µs | bnb + PEFT |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def _ratio(ratio: float | None) -> str:
    """A ratio, in bold type if the peer is faster."""
    if ratio is None:
        return "-"
    return f"**{ratio:.2f}x**" if ratio < 1 else f"{ratio:.2f}x"


def rows(run: Mapping[str, Any]) -> Iterator[str]:
    """The rows of lora_linear, one for each mode, shape and number of tokens."""
    cells = {
        (c["mode"], shape_name(c), c["tokens"], c["timing"]): c
        for c in run["cells"]
        if result_of(c, OURS) is not None
    }
    for mode, shape, tokens, timing in cells:
        if timing != EAGER:
            continue
        eager, graph = cells[mode, shape, tokens, EAGER], cells.get((mode, shape, tokens, GRAPH))
        device = graph or eager
        ours, called = result_of(device, OURS), result_of(eager, OURS)
        assert ours is not None and called is not None
        columns = [f"{mode} {shape}", str(tokens), f"{device_seconds(ours) * 1e6:.1f}"]
        columns += [_ratio(ratio_to_ours(device, peer)) for peer in (PEFT, DECODED, DENSE)]
        columns += [f"{seconds_as_called(called) * 1e6:.0f}"]
        columns += [_ratio(ratio_to_ours(eager, PEFT, seconds_as_called))]
        yield f"| {' | '.join(columns)} |\n"


def block_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """The rows of whole models: the time of a step and of a token, and the peak of a step."""
    yield "| | step, ms | token, ms | peak of a step, MiB | model, MiB |\n|---|---|---|---|---|\n"
    for model in run["models"]:
        for result in model["results"]:
            times = [f"{result[what]['median'] * 1e3:.1f}" for what in ("step", "token")]
            sizes = [f"{result[what] / MIB:.0f}" for what in ("peak_bytes", "model_bytes")]
            yield f"| {result['contender']} | {' | '.join(times + sizes)} |\n"


def section() -> str:
    """The text between the marks of the README."""
    linear, block = load(RESULTS / "lora_linear.json"), models.load(RESULTS / "models.json")
    versions = ", ".join(
        f"{name} {linear['versions'][name]}" for name in ("torch", "bitsandbytes", "peft", "triton")
    )
    gpu = linear["machine"]["gpu"].split(",")[0]
    return (
        f"{gpu}, bf16, LoRA of rank 16 over NF4;\n{versions}. A ratio is the\n"
        "time of the peer over ours, and bold if we lose. The time of the device is that of a\n"
        "CUDA graph with cold caches. A called op also pays for the host, which is slow on this\n"
        "virtual machine.\n\n"
        + HEAD
        + "".join(rows(linear))
        + "\nOne decoder layer of Llama-3 8B with 2,048 tokens: an eager training step under\n"
        "autocast, and a token that is decoded eagerly.\n\n" + "".join(block_lines(block))
    )
