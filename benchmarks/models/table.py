"""The table of whole models: for each contender the time of a step and of a token, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.models.results import PEER

MIB = 2**20
HEAD = ("model", "contender", "step", "vs peer", "token", "vs peer", "peak of a step", "model")
EXPLANATION = (
    "A step is a forward, a backward and an update in {dtype}, with LoRA of rank {rank} on every "
    "linear layer. A token is decoded greedily with a cache. The peak is what a "
    f'step needs beside the model. "vs peer" is the time of {PEER} over this one: above 1 this '
    "one is faster."
)


def rows(run: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of the table, one row for each model and contender."""
    for model in run["models"]:
        peer = next(r for r in model["results"] if r["contender"] == PEER)
        name = f"{model['model']}, {model['tokens']}"
        for result in model["results"]:
            if result["note"]:
                yield name, result["contender"], result["note"], *[""] * 5
                continue
            yield (
                name,
                result["contender"],
                *_time(result, peer, "step"),
                *_time(result, peer, "token"),
                f"{result['peak_bytes'] / MIB:.1f} MiB",
                f"{result['model_bytes'] / MIB:.1f} MiB",
            )


def _time(result: Mapping[str, Any], peer: Mapping[str, Any], what: str) -> tuple[str, str]:
    if what not in result:
        return "", ""
    time = result[what]["median"]
    ratio = f"{peer[what]['median'] / time:.2f}" if what in peer else ""
    return f"{time * 1e3:.1f} ms", ratio


def models_table(run: Mapping[str, Any]) -> str:
    """The table for a console."""
    lines = [HEAD, *rows(run)]
    measured = [line for line in lines if line[3] or line is HEAD]
    widths = [max(len(line[column]) for line in measured) for column in range(len(HEAD))]
    texts = []
    for line in lines:
        first = "  ".join(cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False))
        others = zip(line[2:], widths[2:], strict=True)
        cells = line[2:3] if not line[3] else [cell.rjust(width) for cell, width in others]
        texts.append(f"{first}  {'  '.join(cells)}".rstrip())
    for model in run["models"]:
        for result in model["results"]:
            if "token_error" in result:
                what = f"{model['model']}, {result['contender']}"
                texts.append(f"{what} could not decode: {result['token_error']}")
    return "\n".join([EXPLANATION.format(**run), *texts])
