"""`--compare`: the same job by every method, each in a process of its own, and one table.

A process of its own makes the memory honest: no method sees what another left behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from _bundled_model import bundled_model
from _data import load_examples
from _errors import UserError
from _files import write_json
from _options import METHOD_NAMES, Options

MIB = 2**20
# Each child decides these for itself, or they are set below.
NOT_HANDED_ON = frozenset({"compare", "method", "out", "check", "resume", "samples", "save_every"})


def compare(options: Options) -> int:
    load_examples(options.data)  # a bad file should fail here, not in the first child
    if options.model is None:
        options = replace(options, model=bundled_model())
    out = options.out
    print(f"Training {options.steps} steps by each of {len(METHOD_NAMES)} methods.", flush=True)
    results = []
    for method in METHOD_NAMES:
        print(f"\n{method}", flush=True)
        results.append(run_method(options, method, out / "compare" / method))

    from _plots import save_comparison
    from _report import print_table

    header, rows = table(results)
    print()
    print_table(header, rows)
    print(f"\n{explanation(results)}\n")
    picture, summary = out / "comparison.png", out / "comparison.json"
    title = f"{results[0]['model']}, {options.steps} steps of {options.batch_size} examples"
    save_comparison(picture, results, title)
    write_json(summary, {"header": header, "rows": rows, "runs": results})
    print(f"  {picture}  curves and bars\n  {summary}  every number")
    return 0


def run_method(options: Options, method: str, out: Path) -> dict[str, Any]:
    """Its summary. The progress bar goes to the console, the rest into log.txt."""
    command = [sys.executable, str(Path(__file__).with_name("finetune_qlora.py"))]
    command += ["--method", method, "--out", str(out), "--no-check", "--samples", "0"]
    command += ["--save-every", "0", *handed_on(options, method)]
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


def handed_on(options: Options, method: str) -> list[str]:
    """The options of this run as a command line for another."""
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in NOT_HANDED_ON or value is None or value == ():
            continue
        if field.name == "full_modules" and method != "hybrid":
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return words


def table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("method", "trained", "frozen MiB", "peak MiB", "above libraries", "tokens/s",
              "loss before", "loss after", "perplexity")  # fmt: skip
    rows = []
    for result in results:
        memory, after = result["memory_bytes"], result["after"]
        rows.append(
            (
                result["method"],
                f"{result['trained_parameters'] / 1e6:.2f} M",
                f"{result['frozen_bytes'] / MIB:.0f}",
                f"{memory['peak'] / MIB:.0f}",
                f"{(memory['peak'] - memory['libraries']) / MIB:.0f}",
                f"{result['tokens_per_second']:.0f}",
                f"{result['before']['loss']:.3f}",
                f"{after['loss']:.3f}",
                f"{after['perplexity']:.1f}",
            )
        )
    return header, rows


def explanation(results: list[dict[str, Any]]) -> str:
    kernels = next((r["kernels"] for r in results if r["kernels"]), "none")
    return (
        f"  peft is qlora through PEFT + bitsandbytes; the others run on pylora ({kernels}).\n"
        "  Peak: memory of the process in training. Above libraries: less what imports had taken."
    )
