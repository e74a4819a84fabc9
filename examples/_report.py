"""The report of a run: on the console, in summary.json, and as a picture of the losses."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import textwrap
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import torch
from _methods import saved_bytes
from _model import chosen_kernels, frozen_bytes, trained_parameters
from _options import METHODS

import pylora

matplotlib.use("Agg")  # draws into files and never opens a window

from matplotlib import pyplot

MIB = 2**20
INK, MUTED, GRID, ACCENT = "#1f2933", "#7b8794", "#e4e7eb", "#2563eb"


class Report:
    """Knows the fixed facts of a run. Each method says or writes what has happened so far."""

    def __init__(
        self,
        options: argparse.Namespace,
        model: Any,
        parameters: int,
        folder: Path,
        dtype: torch.dtype,
        memory: dict[str, int],
        started: float,
    ) -> None:
        self.options, self.memory, self.started = options, memory, started
        self.name = folder.resolve().name
        self.dtype = str(dtype).removeprefix("torch.")
        self.parameters = parameters
        self.trained = trained_parameters(model)
        self.frozen = frozen_bytes(model)
        self.kernels = chosen_kernels(model, dtype)
        self.data = str(options.data or "docstrings of the standard library")

    def announce(self, training: int, validation: int, held_out: int, left_out: int) -> None:
        options = self.options
        share = 100 * self.trained / self.parameters
        rows = {
            "model": f"{self.name}, {self.parameters / 1e6:.1f} M parameters",
            "method": f"{options.method}: {METHODS[options.method]}",
            "trained": f"{self.trained / 1e6:.2f} M parameters ({share:.1f} %), fp32",
            "frozen": f"{self.frozen / MIB:.0f} MiB" if self.frozen else "nothing",
            "data": f"{self.data}: {training} to train on, {validation} of {held_out} to validate "
            "with",
            "plan": f"{options.steps} steps of {options.batch_size} examples, learning rate "
            f"{options.learning_rate:g}, {torch.get_num_threads()} CPU threads, {self.dtype}",
        }
        if left_out:
            rows["left out"] = f"{left_out} examples longer than {options.max_length} tokens"
        if self.kernels:
            rows["kernels"] = self.kernels
        if options.checkpoint:
            rows["resumed"] = f"at step {options.checkpoint.name.split('-')[1]} of {options.steps}"
        print("\nFine-tuning with pylora", pylora.__version__)
        for label, value in rows.items():
            print(f"  {label:9} {value}")
        print(flush=True)

    def stopped(self, state: Any, saved: Path, command: str) -> None:
        print(f"\nStopped after step {state.global_step} of {state.max_steps}. Saved:\n  {saved}")
        if command:
            print(f"  {self.options.out / 'checkpoints'}\nTo go on:\n  {command}", flush=True)

    def finished(
        self,
        state: Any,
        before: dict[str, Any],
        saved: Path,
        after: dict[str, Any],
        check: dict[str, Any],
    ) -> None:
        facts, out = _history(state), self.options.out
        print()
        print_table(
            ("", "before", "after"),
            [
                ("validation loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}"),
                ("perplexity", f"{before['perplexity']:.1f}", f"{after['perplexity']:.1f}"),
            ],
        )
        training_memory = (facts["peak"] - self.memory["libraries"]) / MIB
        total = time.perf_counter() - self.started
        print(
            f"\n  speed     {facts['tokens_per_second']:.0f} tokens/s in training"
            f"\n  memory    {facts['peak'] / MIB:.0f} MiB at the peak of training, "
            f"{training_memory:.0f} MiB without the libraries"
            f"\n  time      {facts['seconds']:.0f} s of training, {total:.0f} s in all"
            f"\n  PEFT      {describe_check(check)}\n"
        )
        print_samples(before["samples"], after["samples"])
        saved_as = "model" if self.options.method == "full" else "adapter, in PEFT's format"
        print(
            f"  {saved}  {saved_as}\n  {out / 'loss.png'}  loss curve\n"
            f"  {out / 'summary.json'}  everything above, and every loss\n",
            flush=True,
        )

    def write(
        self,
        state: Any,
        before: dict[str, Any],
        saved: Path,
        after: dict[str, Any] | None,
        check: dict[str, Any] | None,
        switch: float | None = None,
    ) -> None:
        """Writes loss.png and summary.json."""
        options, facts = self.options, _history(state)
        picture = options.out / "loss.png"
        save_loss_curve(picture, facts["losses"], before, after, f"{self.name}, {options.method}")
        write_json(
            options.out / "summary.json",
            {
                "method": options.method,
                "model": self.name,
                "data": self.data,
                "finished": after is not None,
                "options": {k: v for k, v in vars(options).items() if k != "job"},
                "learning_rate": options.learning_rate,
                "compute_dtype": self.dtype,
                "parameters": self.parameters,
                "trained_parameters": self.trained,
                "frozen_bytes": self.frozen,
                "before": before,
                "after": after,
                "peft_check": check,
                "tokens_per_second": facts["tokens_per_second"],
                "train_seconds": facts["seconds"],
                "step_seconds": facts["step_seconds"],
                "switch_seconds": switch,
                "saved_bytes": saved_bytes(saved),
                "total_seconds": time.perf_counter() - self.started,
                "memory_bytes": {
                    "what": "resident set" if options.device == "cpu" else "allocated by torch",
                    **self.memory,
                    "peak": facts["peak"],
                },
                "kernels": self.kernels,
                "losses": facts["losses"],
                "files": {"trained": saved, "loss_curve": picture},
                "machine": _machine(options.device),
            },
        )


def _history(state: Any) -> dict[str, Any]:
    """Returns every step's loss, and the speed and time since the start or the last resumption."""
    steps = [entry for entry in state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "peak": max(entry["peak_bytes"] for entry in steps),
        "seconds": steps[-1]["train_runtime"],
        "step_seconds": statistics.median(entry["seconds"] for entry in steps),
        "tokens_per_second": steps[-1]["train_tokens_per_second"],
    }


def _machine(device: str) -> dict[str, Any]:
    versions = {"pylora": pylora.__version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    cpu = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


# --- console --------------------------------------------------------------------------------------


def describe_check(check: dict[str, Any]) -> str:
    if "skipped" in check:
        return f"not compared: {check['skipped']}"
    ours, theirs = check["pylora"]["rms_error"], check["peft"]["rms_error"]
    verdict = "the same logits" if check["agrees"] else "OTHER LOGITS"
    return f"reloaded the adapter: {verdict} (rms error {ours:.1e} here, {theirs:.1e} there)"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, tuple("-" * width for width in widths), *rows):
        first, *others = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "   ".join((first, *others)).rstrip())


def print_samples(before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """Prints each prompt, and below it the texts from before and after training, side by side."""
    room = min(shutil.get_terminal_size((100, 24)).columns, 120)
    width = max(24, (room - 7) // 2)
    for old, new in zip(before, after, strict=True):
        title = new["prompt"] or "(continuing the text)"
        print(textwrap.fill(title, room - 2, initial_indent="  ", subsequent_indent="    "))
        expected = f"expected: {new['expected']}"
        print(textwrap.indent(textwrap.fill(expected, room - 6, max_lines=3), "    "))
        left, right = (
            textwrap.wrap(f"{when}: {' '.join(sample['written'].split())}", width, max_lines=5)
            for when, sample in (("before", old), ("after", new))
        )
        for left_line, right_line in zip_longest(left, right, fillvalue=""):
            print(f"    {left_line:{width}} | {right_line}".rstrip())
        print()


# --- files ----------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Replaces the file in one step: it is always the whole old file or the whole new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    write_file(path, (text + "\n").encode())


def save_figure(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    write_file(path, buffer.getvalue())


def plain_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_color(INK)
    axes.tick_params(colors=MUTED, labelcolor=INK)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Returns the exponential moving average, without a bias towards its start."""
    average, total, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(average / total)
    return result


def save_loss_curve(
    path: Path,
    losses: Sequence[float],
    before: dict[str, Any],
    after: dict[str, Any] | None,
    title: str,
) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color=ACCENT, linewidth=2, label="training, smoothed")
    points = [(0, before["loss"])] + ([(len(losses), after["loss"])] if after else [])
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "o", color=INK, markersize=7, label="validation", zorder=3)
    for step, loss in points:  # the numbers stand outside the curve
        offset, side = ((9, -4), "left") if step else ((-9, -4), "right")
        axes.annotate(
            f"{loss:.2f}", (step, loss), offset, textcoords="offset points", ha=side, color=INK
        )
    axes.set(title=title, xlabel="step", ylabel="loss per token of the completion")
    axes.legend(frameon=False)
    axes.margins(x=0.09, y=0.1)
    plain_frame(axes)
    save_figure(figure, path)
