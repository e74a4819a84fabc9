"""The README's tables of LoRA layers and of the other ops on a CPU, from the committed JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.contenders_dropout import PROBABILITY
from benchmarks.contenders_layers import OVER_DENSE
from benchmarks.contenders_peers import LORA, PEFT_OVER_DENSE
from benchmarks.harness import WARM_CALLS
from benchmarks.machine import ROOT
from benchmarks.models.results import ACCELERATED, DENSE_ACCELERATED, DENSE_PEER, PEER
from benchmarks.models.results import load as load_models
from benchmarks.report import host_tables
from benchmarks.report.memory_table import memory_table
from benchmarks.report.ratio_table import grid, ratio_table, ratio_text
from benchmarks.results import (
    KEPT_STEM,
    MODELS_FILES,
    OURS,
    InvalidResults,
    file_stem,
    load,
)
from benchmarks.statistics import FEW_SAMPLES

RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-amx"
TABLES = {
    "lora_layer": "LoRA in bf16",
    "lora_layer_autocast": "LoRA in fp32 under autocast to bf16",
}
# What a row compares: its name, ours and the peer.
BITSANDBYTES = tuple(contender.name for contender in LORA[:2])
PAIRS = (
    *((name.replace("bitsandbytes", "bnb"), OURS, name) for name in BITSANDBYTES),
    (PEFT_OVER_DENSE.name, OVER_DENSE, PEFT_OVER_DENSE.name),
)
_ADAPTERS = (
    ("eager torch in bf16", OURS, "eager torch"),
    ("eager torch in fp32", "pylora fp32", "eager torch fp32"),
)
_ONE_BY_ONE = ("lora_linear one by one", OURS, "pylora, lora_linear one by one")
# The other ops, which are shown if they were measured: a title, and what a row compares.
OTHERS = {
    "lora_layer_dropout": (
        f"Training steps of LoRA in bf16 with a dropout of {PROBABILITY} before the low-rank path",
        PAIRS,
    ),
    "bottleneck_adapter": ("A bottleneck adapter, by bottleneck and hidden size", _ADAPTERS),
    "multi_bottleneck_adapter": ("Eight bottleneck adapters in a batch", _ADAPTERS),
    "multi_lora_linear": (
        "Eight LoRA adapters in a batch over NF4",
        (
            ("one by one", OURS, "pylora nf4_linear, adapters one by one"),
            *((name.replace("bitsandbytes", "bnb"), OURS, name) for name in BITSANDBYTES),
        ),
    ),
    "dora_layer": (
        "DoRA, against PEFT's DoRA and against plain LoRA, which does less",
        (
            *PAIRS,
            ("plain LoRA, NF4", OURS, "pylora, plain LoRA"),
            ("plain LoRA, dense", OVER_DENSE, f"{OVER_DENSE}, plain LoRA"),
        ),
    ),
    "lora_qkv": ("Query, key and value in one op over NF4", (_ONE_BY_ONE, *PAIRS[:2])),
    "lora_mlp": ("A gated MLP in one op over NF4", (_ONE_BY_ONE, *PAIRS[:2])),
}
# The rows of the table of host times, from the outermost layer inwards, and the peers.
HOST_ROWS = (
    OURS,
    "pylora F.lora_linear",
    "pylora op lora_linear",
    "nn.Linear",
    PEFT_OVER_DENSE.name,
    *BITSANDBYTES,
)
HOST = """Each number is the median time of one of several calls in a row, on a layer so small that
Python and torch take nearly all of it. `nn.LoRALinear` keeps what `F.lora_linear` checks
and plans in each call.
"""
MEMORY = """A number counts y, the gradients and everything that is allocated on the way, but not
x and the layer. The step is not the first one of its process.
"""
KEPT = """By default glibc gives a large block back to the system as soon as it is freed. The
results of the next call then lie on fresh pages, and both sides wait for Linux to clear
them. Here glibc kept the pages (`python -m benchmarks run --keep-heap`), and so only the
computation differs."""


def section(folder: Path = RESULTS) -> str:
    """Returns the text between the marks of the README, from the JSON in this folder."""
    runs = {name: _run(folder, name) for name in TABLES}
    shown, *others = TABLES
    parts = [f"{_head(runs[shown])}\n{TABLES[shown]}:\n\n{ratio_table(runs[shown], PAIRS, True)}"]
    kept = _run_if_measured(folder, f"{shown}{KEPT_STEM}")
    if kept is not None:
        text = f"{KEPT}\n\n{ratio_table(kept, PAIRS, True)}"
        parts.append(_folded("The same with the heap kept", text))
    for name in others:
        table = ratio_table(runs[name], PAIRS, True)
        parts.append(_folded(f"The same with {TABLES[name]}", table))
    parts += _memory(folder, runs[shown])
    parts += _host(folder)
    rest = "\n".join([*_other_ops(folder), _models(folder)])
    parts.append(_folded("The other ops, and whole models", rest))
    return "".join(parts)


def _run(folder: Path, stem: str) -> dict[str, Any]:
    """Returns the run in the file of this name. Raises InvalidResults if it belongs elsewhere."""
    path = folder / f"{stem}.json"
    run = load(path)
    if file_stem(run) != stem:
        raise InvalidResults(
            f"{path} has the name of another run; it must be {file_stem(run)}.json"
        )
    return run


def _run_if_measured(folder: Path, stem: str) -> dict[str, Any] | None:
    return _run(folder, stem) if (folder / f"{stem}.json").exists() else None


def _head(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    isa = "AMX" if "amx_bf16" in machine["flags"] else "AVX-512"
    versions = ", ".join(
        f"{name} {run['versions'][name]}" for name in ("torch", "bitsandbytes", "peft")
    )
    return (
        f"{machine['cpu']} with {isa}, {machine['threads']} threads, x in bf16, LoRA of rank"
        f" 16;\n{versions}. Each number is the time of PEFT's\nlayer over that of"
        " `nn.LoRALinear` on the same kind of weight, and bold if we lose. The\ncolumns are"
        " numbers of tokens; f+b is a forward with its backward; eval and train are\nthe"
        " two ways in which bitsandbytes runs on a CPU. A dash stands for fewer than\n"
        f"{FEW_SAMPLES} samples, or none. Each layer was called {WARM_CALLS} times before it was"
        " timed, as those of a\nrunning model were.\n"
    )


def _other_ops(folder: Path) -> Iterator[str]:
    """A table for each other op that has been measured on this machine."""
    for op, (title, pairs) in OTHERS.items():
        run = _run_if_measured(folder, op)
        if run is not None:
            yield f"{title} (`{op}`):\n\n{ratio_table(run, pairs)}"


def _memory(folder: Path, of_layers: Mapping[str, Any]) -> Iterator[str]:
    """A folded table of the memory of LoRA layers and of adapters, if it was measured."""
    adapters = _run_if_measured(folder, "bottleneck_adapter")
    tables = {
        "LoRA layers": memory_table(of_layers, PAIRS),
        "Bottleneck adapters": memory_table(adapters, _ADAPTERS) if adapters else "",
    }
    texts = [
        f"{title}, by shape and tokens:\n\n{table}" for title, table in tables.items() if table
    ]
    if texts:
        text = "\n".join([MEMORY, *texts])
        yield _folded("Peak extra memory of a training step, MiB", text)


def _host(folder: Path) -> Iterator[str]:
    """A folded table of the time that a call of a tiny layer takes, if it was measured."""
    run = _run_if_measured(folder, "host")
    if run is not None:
        texts = [HOST]
        for cells in host_tables.groups(run):
            title = f"{host_tables.title(cells)}, threads: {run['machine']['threads']}"
            table = grid(host_tables.short_table(cells, HOST_ROWS))
            texts.append(f"{title}:\n\n{table}\n{host_tables.control_line(cells)}\n")
        yield _folded("What a call costs beside the computation, µs", "\n".join(texts))


def _models(folder: Path) -> str:
    """The ratios of whole models, over NF4 weights and over dense ones."""
    run = load_models(folder / f"{MODELS_FILES}.json")
    pairs = (("NF4", PEER, ACCELERATED), ("dense", DENSE_PEER, DENSE_ACCELERATED))
    quantities = ("step", "token")
    lines = [["", *(f"{what}, {weights}" for weights, *_ in pairs for what in quantities)]]
    for model in run["models"]:
        by_name = {result["contender"]: result for result in model["results"]}
        line = [f"{model['model']}, {model['tokens']}"]
        for _, peer, ours in pairs:
            for what in quantities:
                times = [by_name.get(name, {}).get(what) for name in (peer, ours)]
                line.append(
                    ratio_text(times[0]["median"] / times[1]["median"] if all(times) else None)
                )
        lines.append(line)
    return (
        "Whole models, PEFT over PEFT accelerated by pylora: the time of a training step and of a"
        f" token\nthat is decoded with a cache.\n\n{grid(lines)}"
    )


def _folded(summary: str, text: str) -> str:
    return f"\n<details><summary>{summary}</summary>\n\n{text}\n</details>\n"
