"""The command line, and how a resumed run gets the options that it was started with."""

from __future__ import annotations

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

METHODS = {
    "full": "every parameter, fp32",
    "lora": "LoRA over the dense base",
    "qlora": "LoRA over an NF4 base",
    "dora": "DoRA over the dense base",
    "adalora": "PEFT's AdaLoRA over the dense base, accelerated by pylora",
    "adapter": "Pfeiffer's bottleneck adapters over the dense base",
    "qadapter": "the same adapters over an NF4 base",
    "prompt": "PEFT's prompt tuning of the dense base",
    "hybrid": "LoRA over an NF4 base, a few modules trained in full",
    "peft": "the same as qlora through PEFT + bitsandbytes",
}
NF4_METHODS = ("qlora", "qadapter", "hybrid", "peft")
ADAPTER_METHODS = ("adapter", "qadapter")
PEFT_METHODS = ("adalora", "prompt", "peft")  # their models are PeftModels
RESUMABLE = tuple(method for method in METHODS if method != "adalora")
# The usual rates of the methods. Those of adapters, AdaLoRA and prompts are the best of two that
# were tried in 24 steps of the default job.
LEARNING_RATES = dict.fromkeys(METHODS, 1e-3) | {
    "full": 1e-4,
    "adalora": 4e-3,
    "adapter": 4e-3,
    "qadapter": 4e-3,
    "prompt": 3e-2,
}

# The name of an option, its default value and what --help says about it.
OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("out", Path("build/demo"), "folder for everything that is written"),
    ("model", None, "folder of a transformers causal LM (default: the bundled SmolLM2-135M)"),
    ("data", None, "JSON Lines or text file (default: the standard library's docstrings)"),
    ("method", "qlora", "; ".join(f"{name}: {text}" for name, text in METHODS.items())),
    ("steps", 200, "training steps"),
    ("batch_size", 8, "examples in a step"),
    ("max_length", 96, "length of the longest example, in tokens"),
    ("learning_rate", None, "highest learning rate (default: one for each method)"),
    ("r", 16, "rank of the LoRA matrices"),
    ("alpha", 32, "LoRA's alpha; the scaling is alpha / r"),
    ("dropout", 0.0, "dropout before LoRA"),
    ("full_modules", (), "hybrid: modules to train in full (default: the last layer's MLP)"),
    ("reduction_factor", 16.0, "adapter, qadapter: hidden size over the bottleneck's"),
    ("virtual_tokens", 16, "prompt: number of trained tokens before the prompt"),
    ("seed", 0, "decides the order of the data and the initial trained parameters"),
    ("seeds", 1, "compare: number of runs of each method, with seeds from --seed on"),
    ("jobs", 1, "compare: number of runs at the same time"),
    ("validation_examples", 96, "number of examples in the validation loss"),
    ("samples", 3, "number of texts to generate before and after training"),
    ("sample_tokens", 32, "length of the longest generated text, in tokens"),
    ("save_every", 50, "steps between checkpoints; 0: only if the run is interrupted"),
    ("threads", 0, "CPU threads; 0: as many as torch chooses"),
    ("device", "cpu", "where to train: cpu or cuda"),
)
FLAGS = {
    "short": "a few steps, for a quick check",
    "resume": "go on from the checkpoint in --out; with --compare, keep the runs that finished",
    "compare": "train by every method and print one table",
    "no_check": "do not reload the adapter through PEFT to compare logits",
    "measure_switch": "after training, measure how long a switch to another task takes",
}
# The --short run is long enough for the loss to fall and for every part to run once.
SHORT = {"steps": 16, "validation_examples": 32, "sample_tokens": 20}
# These options decide the result. A resumed run takes them from its checkpoint.
LASTING = (
    "method steps batch_size max_length learning_rate r alpha dropout full_modules "
    "reduction_factor virtual_tokens seed validation_examples"
).split()
MINIMUM = {
    **dict.fromkeys(("steps", "batch_size", "r", "alpha", "sample_tokens"), 1),
    **dict.fromkeys(("reduction_factor", "virtual_tokens", "seeds", "jobs"), 1),
    **dict.fromkeys(("samples", "threads", "save_every"), 0),
    "validation_examples": 1,
    "max_length": 8,
}


class UserError(Exception):
    """A mistake that the user can correct. The message is printed without a traceback."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options. If a run is resumed, `checkpoint` and `job` say what it goes on from."""
    given = vars(_parser().parse_args(argv))
    if given.get("short"):
        given = {**SHORT, **given}
    defaults = {name: default for name, default, _ in OPTIONS} | dict.fromkeys(FLAGS, False)
    options = argparse.Namespace(**{**defaults, **given}, checkpoint=None, job=None)
    options.full_modules = list(options.full_modules)
    _check(options)
    if options.resume and not options.compare:
        options.checkpoint, options.job = find_checkpoint(options.out)
        for name, value in options.job["options"].items():
            if name in given and getattr(options, name) != value:
                raise UserError(
                    f"--resume: the checkpoint in {options.out} has {name.replace('_', '-')} "
                    f"{value}, but {flag(name)} {getattr(options, name)} was given"
                )
            setattr(options, name, value)
        if options.method not in RESUMABLE:
            raise UserError(
                f"--resume: a run of {options.method} cannot be resumed, because PEFT does not "
                "save how important each rank was so far"
            )
    # With --compare, each method takes its own learning rate.
    if options.learning_rate is None and not options.compare:
        options.learning_rate = LEARNING_RATES[options.method]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small language model with QLoRA, from data to a checked adapter.",
        argument_default=argparse.SUPPRESS,  # an option that is not given stays out of the result
        allow_abbrev=False,
    )
    special: dict[str, dict[str, Any]] = {
        "model": {"type": Path},
        "data": {"type": Path},
        "learning_rate": {"type": float},
        "method": {"choices": list(METHODS)},
        "full_modules": {"nargs": "+", "type": str, "metavar": "NAME"},
    }
    for name, default, text in OPTIONS:
        if default not in (None, ()):
            text += f" (default: {default})"
        arguments = {"type": type(default), **special.get(name, {})}
        parser.add_argument(flag(name), help=text, **arguments)
    for name, text in FLAGS.items():
        parser.add_argument(flag(name), help=text, action="store_true")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, minimum in MINIMUM.items():
        if (value := getattr(options, name)) < minimum:
            raise UserError(f"{flag(name)} is {value}, must be at least {minimum}")
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout is {options.dropout}, must be at least 0 and below 1")
    if options.learning_rate is not None and not options.learning_rate > 0:
        raise UserError(f"--learning-rate is {options.learning_rate}, must be above 0")
    if options.full_modules and options.method != "hybrid" and not options.compare:
        raise UserError("--full-modules is for --method hybrid")
    for name in ("seeds", "jobs"):
        if (value := getattr(options, name)) > 1 and not options.compare:
            raise UserError(f"{flag(name)} is {value}, but it is for --compare")


def find_checkpoint(out: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the newest complete checkpoint in `out`, and the job that it belongs to."""
    # The Trainer writes trainer_state.json last: a checkpoint without it is unfinished.
    complete = (out / "checkpoints").glob("checkpoint-*/trainer_state.json")
    newest = max(complete, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    if newest is None:
        raise UserError(f"--resume: there is no checkpoint in {out}")
    for file in (*newest.parent.glob("*.pt"), *newest.parent.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            raise UserError(f"--resume: {file} is damaged, must be a file that torch.save wrote")
    path = out / "checkpoints" / "job.json"
    try:
        return newest.parent, json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: {path} cannot be read: {error}") from None
