"""The README's tables of LoRA layers and of the other ops on a CPU, from the committed JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.contenders_layers import OVER_DENSE
from benchmarks.contenders_peers import LORA, PEFT_OVER_DENSE
from benchmarks.machine import ROOT
from benchmarks.models.results import ACCELERATED, DENSE_ACCELERATED, DENSE_PEER, PEER
from benchmarks.models.results import load as load_models
from benchmarks.report.tables import shape_name
from benchmarks.results import MODELS_FILES, OURS, load, result_of
from benchmarks.statistics import CONTROL_TOLERANCE, FEW_SAMPLES

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
# The other ops: a title, and what a row compares.
OTHERS = {
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
Rows = Sequence[tuple[str, Mapping[int, float | None]]]
FEW_TOKENS, GOAL_FEW, GOAL_MANY = 64, 1.05, 0.99


def ratio(cell: Mapping[str, Any], ours: str, peer: str) -> float | None:
    """Returns the peer's time over ours, or None if either has too few samples."""
    results = result_of(cell, ours), result_of(cell, peer)
    if any(result is None or result["samples"] < FEW_SAMPLES for result in results):
        return None
    first, second = results
    assert first is not None and second is not None
    return float(second["median_s"] / first["median_s"])


def reaches_goal(value: float, tokens: int) -> bool:
    return value >= (GOAL_FEW if tokens <= FEW_TOKENS else GOAL_MANY)


def _rows(
    run: Mapping[str, Any], pairs: Sequence[tuple[str, str, str]] = PAIRS
) -> Iterator[tuple[str, dict[int, float | None]]]:
    """The title of each row, with the ratios by the number of tokens."""
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in run["cells"]:
        lines.setdefault((shape_name(cell), cell["mode"]), []).append(cell)
    for (shape, mode), cells in lines.items():
        for name, ours, peer in pairs:
            ratios = {cell["tokens"]: ratio(cell, ours, peer) for cell in cells}
            if any(value is not None for value in ratios.values()):
                yield f"{shape} {mode.replace('forward+backward', 'f+b')}, {name}", ratios


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def _grid(rows: Rows) -> str:
    tokens = sorted({count for _, ratios in rows for count in ratios})
    lines = [["", *map(str, tokens)], ["---"] * (len(tokens) + 1)]
    lines += [[title, *(_text(ratios.get(count)) for count in tokens)] for title, ratios in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _measured(rows: Rows) -> list[tuple[float, int]]:
    """The ratios with their numbers of tokens."""
    return [(value, m) for _, ratios in rows for m, value in ratios.items() if value is not None]


def _table(run: Mapping[str, Any]) -> str:
    """The rows of one run, and a sentence that counts the goals that are met."""
    rows = list(_rows(run))
    measured = _measured(rows)
    won = sum(value >= 1 for value, _ in measured)
    met = sum(reaches_goal(*pair) for pair in measured)
    return (
        f"{_grid(rows)}\nOf {len(measured)} ratios, {won} are at least 1, and {met} reach the goal"
        f" of {GOAL_FEW} up to {FEW_TOKENS} tokens and\n{GOAL_MANY} above. {_noise(run)}\n"
    )


def _noise(run: Mapping[str, Any]) -> str:
    controls = [cell["control_ratio"] for cell in run["cells"] if cell["control_ratio"]]
    noisy = sum(abs(control - 1) > CONTROL_TOLERANCE for control in controls)
    return (
        f"Two copies of pylora differed by more than {CONTROL_TOLERANCE:.0%}\nin {noisy} of"
        f" {len(controls)} measurements, which shows how noisy the machine is."
    )


def _other_ops() -> Iterator[str]:
    """A table for each other op that has been measured on this machine."""
    for op, (title, pairs) in OTHERS.items():
        run = load(RESULTS / f"{op}.json")
        rows = list(_rows(run, pairs))
        measured = _measured(rows)
        won = sum(value >= 1 for value, _ in measured)
        yield (
            f"{title} (`{op}`):\n\n{_grid(rows)}\n{won} of {len(measured)} ratios are at least 1."
            f" {_noise(run)}\n"
        )


def _models() -> str:
    """The ratios of whole models, over NF4 weights and over dense ones."""
    run = load_models(RESULTS / f"{MODELS_FILES}.json")
    pairs = (("NF4", PEER, ACCELERATED), ("dense", DENSE_PEER, DENSE_ACCELERATED))
    quantities = ("step", "token")
    head = ["", *(f"{what}, {weights}" for weights, *_ in pairs for what in quantities)]
    lines = [head, ["---"] * len(head)]
    for model in run["models"]:
        by_name = {result["contender"]: result for result in model["results"]}
        line = [f"{model['model']}, {model['tokens']}"]
        for _, peer, ours in pairs:
            for what in quantities:
                times = [by_name.get(name, {}).get(what) for name in (peer, ours)]
                line.append(_text(times[0]["median"] / times[1]["median"] if all(times) else None))
        lines.append(line)
    grid = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (
        "Whole models, PEFT over PEFT accelerated by pylora: the time of a training step and of a"
        f" token\nthat is decoded with a cache.\n\n{grid}"
    )


def section() -> str:
    """The text between the marks of the README."""
    runs = {name: load(RESULTS / f"{name}.json") for name in TABLES}
    first = next(iter(runs.values()))
    machine = first["machine"]
    isa = "AMX" if "amx_bf16" in machine["flags"] else "AVX-512"
    versions = ", ".join(
        f"{name} {first['versions'][name]}" for name in ("torch", "bitsandbytes", "peft")
    )
    head = (
        f"{machine['cpu']} with {isa}, {machine['threads']} threads, x in bf16, LoRA of rank"
        f" 16;\n{versions}. Each number is the time of PEFT's\nlayer over that of"
        " `nn.LoRALinear` on the same kind of weight, and bold if we lose. The\ncolumns are"
        " numbers of tokens; f+b is a forward with its backward; eval and train are\nthe"
        " two ways in which bitsandbytes runs on a CPU. A dash stands for fewer than\n"
        f"{FEW_SAMPLES} samples, or none.\n"
    )
    shown, *folded = TABLES
    parts = [f"{head}\n{TABLES[shown]}:\n\n{_table(runs[shown])}"]
    for name in folded:
        parts.append(_folded(f"The same with {TABLES[name]}", _table(runs[name])))
    others = "\n".join([*_other_ops(), _models()])
    parts.append(_folded("The other ops, and whole models", others))
    return "".join(parts)


def _folded(summary: str, text: str) -> str:
    return f"\n<details><summary>{summary}</summary>\n\n{text}\n</details>\n"
