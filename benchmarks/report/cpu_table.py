"""The README's tables of LoRA layers on a CPU, made from the committed JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.contenders_layers import OVER_DENSE
from benchmarks.contenders_peers import LORA, PEFT_OVER_DENSE
from benchmarks.machine import ROOT
from benchmarks.report.tables import shape_name
from benchmarks.results import OURS, load, result_of
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


def _rows(run: Mapping[str, Any]) -> Iterator[tuple[str, dict[int, float | None]]]:
    """The title of each row, with the ratios by the number of tokens."""
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in run["cells"]:
        lines.setdefault((shape_name(cell), cell["mode"]), []).append(cell)
    for (shape, mode), cells in lines.items():
        for name, ours, peer in PAIRS:
            ratios = {cell["tokens"]: ratio(cell, ours, peer) for cell in cells}
            if any(value is not None for value in ratios.values()):
                yield f"{shape} {mode.replace('forward+backward', 'f+b')}, {name}", ratios


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def _table(run: Mapping[str, Any]) -> str:
    """The rows of one run, and a sentence that counts the goals that are met."""
    rows = list(_rows(run))
    tokens = list(rows[0][1])
    lines = [["", *map(str, tokens)], ["---"] * (len(tokens) + 1)]
    lines += [[title, *(_text(ratios[count]) for count in tokens)] for title, ratios in rows]
    measured = [
        (value, count) for _, ratios in rows for count, value in ratios.items() if value is not None
    ]
    won = sum(value >= 1 for value, _ in measured)
    met = sum(reaches_goal(*pair) for pair in measured)
    controls = [cell["control_ratio"] for cell in run["cells"] if cell["control_ratio"]]
    noisy = sum(abs(control - 1) > CONTROL_TOLERANCE for control in controls)
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        + f"\nOf {len(measured)} ratios, {won} are at least 1, and {met} reach the goal of"
        f" {GOAL_FEW} up to {FEW_TOKENS} tokens and\n{GOAL_MANY} above. Two copies of pylora"
        f" differed by more than {CONTROL_TOLERANCE:.0%}\nin {noisy} of {len(controls)}"
        " measurements, which shows how noisy the machine is.\n"
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
        f"{FEW_SAMPLES} samples.\n"
    )
    shown, *folded = TABLES
    parts = [f"{head}\n{TABLES[shown]}:\n\n{_table(runs[shown])}"]
    for name in folded:
        summary = f"<summary>The same with {TABLES[name]}</summary>"
        parts.append(f"\n<details>{summary}\n\n{_table(runs[name])}\n</details>\n")
    return "".join(parts)
