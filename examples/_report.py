"""What a run says: on the console, in summary.json and as a loss curve."""

from __future__ import annotations

import platform
import shutil
import textwrap
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _files import write_json
from _methods import METHODS
from _phases import Phases
from _plots import save_loss_curve

import pylora

if TYPE_CHECKING:
    from _job import Job

MIB = 2**20


def announce(job: Job) -> None:
    options = job.options
    total = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    share = 100 * total / job.base_parameters
    data = options.data or "docstrings of the standard library"
    rows = [
        ("model", f"{job.model_name}, {job.base_parameters / 1e6:.1f} M parameters"),
        ("method", f"{options.method}: {METHODS[options.method].title}"),
        ("trained", f"{total / 1e6:.2f} M parameters ({share:.1f} %), fp32"),
        ("frozen", f"{job.frozen_bytes / MIB:.0f} MiB" if job.frozen_bytes else "nothing"),
        (
            "data",
            f"{data}: {len(job.train_items)} to train on, "
            f"{len(job.validation_items)} of {job.held_out} to validate with",
        ),
        (
            "plan",
            f"{options.steps} steps of {options.batch_size} examples, learning rate {job.rate:g}, "
            f"{torch.get_num_threads()} CPU threads",
        ),
    ]
    if job.dropped:
        rows.append(("left out", f"{job.dropped} examples longer than {options.max_length} tokens"))
    if job.kernels:
        rows.append(("kernels", job.kernels))
    if job.history.step:
        rows.append(("resumed", f"at step {job.history.step} of {options.steps}"))
    print("\nFine-tuning with pylora", pylora.__version__)
    for label, value in rows:
        print(f"  {label:9} {value}")
    print(flush=True)


def report_stop(job: Job, exported: Path, command: str) -> None:
    print(
        f"\nStopped after step {job.history.step} of {job.options.steps}. Saved:\n"
        f"  {exported}\n  {job.options.out / 'checkpoint'}\nTo go on:\n  {command}",
        flush=True,
    )


def report_result(
    job: Job, exported: Path, after: dict[str, Any], check: dict[str, Any], phases: Phases
) -> None:
    before, history = job.before, job.history
    print()
    print_table(
        ("", "before", "after"),
        [
            ("validation loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}"),
            ("perplexity", f"{before['perplexity']:.1f}", f"{after['perplexity']:.1f}"),
        ],
    )
    print()
    own = (job.memory["peak"] - job.memory["libraries"]) / MIB
    print(f"  {'speed':9} {history.tokens_per_second:.0f} tokens/s in training")
    print(f"  {'memory':9} {job.memory['peak'] / MIB:.0f} MiB at the peak of training, "
          f"{own:.0f} MiB without the libraries")  # fmt: skip
    print(f"  {'time':9} {history.seconds:.0f} s of training, {phases.total():.0f} s in all")
    print(f"  {'PEFT':9} {describe_check(check)}")
    if after["samples"]:
        print()
        print_samples(before["samples"], after["samples"])
    print()
    out = job.options.out
    kind = "model" if job.options.method == "full" else "adapter, in PEFT's format"
    for path, what in (
        (exported, kind),
        (out / "loss.png", "loss curve"),
        (out / "summary.json", "everything above, and every loss"),
    ):
        print(f"  {path}  {what}")
    print(flush=True)


def describe_check(check: dict[str, Any]) -> str:
    if "skipped" in check:
        return f"not compared: {check['skipped']}"
    ours, theirs = check["pylora"]["rms_error"], check["peft"]["rms_error"]
    verdict = "the same logits" if check["agrees"] else "OTHER LOGITS"
    return (
        f"reloaded the adapter: {verdict} (rms error against fp32: "
        f"{ours:.4f} here, {theirs:.4f} there)"
    )


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for index, row in enumerate((header, *rows)):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "   ".join(cells).rstrip())
        if index == 0:
            print("  " + "   ".join("-" * width for width in widths))


def print_samples(before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """Each prompt, and below it what was written before and after, side by side."""
    room = min(shutil.get_terminal_size((100, 24)).columns, 120)
    width = max(24, (room - 7) // 2)
    for old, new in zip(before, after, strict=True):
        title = new["prompt"] or "(continuing the text)"
        print(textwrap.fill(title, room - 2, initial_indent="  ", subsequent_indent="    "))
        print(textwrap.fill(f"expected: {new['expected']}", room - 2, initial_indent="    ",
                            subsequent_indent="    ", max_lines=3))  # fmt: skip
        left = textwrap.wrap(f"before: {flat(old['written'])}", width, max_lines=5)
        right = textwrap.wrap(f"after: {flat(new['written'])}", width, max_lines=5)
        for one, other in zip_longest(left, right, fillvalue=""):
            print(f"    {one:{width}} | {other}".rstrip())
        print()


def flat(text: str) -> str:
    return " ".join(text.split())


def write_summary(
    job: Job,
    exported: Path,
    after: dict[str, Any] | None,
    check: dict[str, Any] | None,
    phases: Phases,
) -> None:
    options, history = job.options, job.history
    save_loss_curve(
        options.out / "loss.png",
        history.losses,
        job.before["loss"],
        after["loss"] if after else None,
        f"{job.model_name}, {options.method}",
    )
    write_json(
        options.out / "summary.json",
        {
            "method": options.method,
            "model": job.model_name,
            "data": str(options.data or "docstrings of the standard library"),
            "finished": after is not None,
            "options": {name: _plain(value) for name, value in vars(options).items()},
            "learning_rate": job.rate,
            "trained_parameters": job.trained_parameters,
            "frozen_bytes": job.frozen_bytes,
            "before": job.before,
            "after": after,
            "peft_check": check,
            "tokens_per_second": history.tokens_per_second,
            "train_seconds": history.seconds,
            "total_seconds": phases.total(),
            "phase_seconds": phases.seconds,
            "memory_bytes": {
                "what": "resident set" if job.device.type == "cpu" else "allocated by torch",
                **job.memory,
            },
            "kernels": job.kernels,
            "losses": history.losses,
            "files": {"trained": str(exported), "loss_curve": str(options.out / "loss.png")},
            "machine": {
                "device": _device_name(job.device),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                **_versions(),
            },
        },
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    found = {"pylora": pylora.__version__}
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
