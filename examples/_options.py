"""The command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from _errors import UserError

METHOD_NAMES = ("qlora", "lora", "hybrid", "full", "peft")

# What decides a run's result: written into its checkpoint, and kept when it is resumed.
LASTING = (
    "method steps batch_size max_length learning_rate r alpha dropout full_modules seed "
    "validation_examples"
).split()


@dataclass
class Options:
    out: Path = Path("build/demo")
    model: Path | None = None
    data: Path | None = None
    method: str = "qlora"
    steps: int = 200
    batch_size: int = 8
    max_length: int = 96
    learning_rate: float | None = None  # None: the method's own
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    full_modules: tuple[str, ...] = ()
    seed: int = 0
    validation_examples: int = 96
    samples: int = 3
    sample_tokens: int = 32
    save_every: int = 50
    threads: int = 0  # 0: as many as torch chooses
    device: str = "cpu"
    compare: bool = False
    resume: bool = False
    check: bool = True


# Enough to see the loss fall and every part of the program run once.
SHORT = {"steps": 16, "validation_examples": 32, "sample_tokens": 20}


def parse_options(argv: list[str] | None = None) -> tuple[Options, set[str]]:
    """(options, the names of those that were given)."""
    given = vars(_parser().parse_args(argv))
    short = given.pop("short", False)
    values: dict[str, Any] = {**(SHORT if short else {}), **given}
    options = Options(**values)
    _check(options)
    return options, set(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small language model with QLoRA on the CPU, from data to adapter.",
        argument_default=argparse.SUPPRESS,  # so that what was not given can come from a checkpoint
        allow_abbrev=False,
    )
    default = Options()

    def add(name: str, text: str, **arguments: Any) -> None:
        field = name.lstrip("-").replace("-", "_")
        value = getattr(default, field, None)
        if value not in (None, False, True, ()):
            text += f" (default: {value})"
            arguments.setdefault("type", type(value))
        parser.add_argument(name, help=text, dest=field, **arguments)

    add("--out", "folder for everything that is written", metavar="DIR", type=Path)
    add("--model", "folder of a transformers causal LM (default: SmolLM2)", type=Path)
    add("--data", "JSON Lines or text (default: the standard library's docstrings)", type=Path)
    add("--method", "how to train; peft is qlora through PEFT + bitsandbytes", choices=METHOD_NAMES)
    add("--compare", "train by every method and print one table", action="store_true")
    add("--resume", "go on from the checkpoint in --out", action="store_true")
    add("--short", "a few steps, for a quick check", action="store_true")
    add("--steps", "training steps")
    add("--batch-size", "examples in a step")
    add("--max-length", "longest example, in tokens")
    add("--learning-rate", "highest rate (default: by method)", type=float)
    add("--r", "rank of the LoRA matrices")
    add("--alpha", "LoRA's alpha; the scaling is alpha / r")
    add("--dropout", "dropout before LoRA", type=float)
    add("--full-modules", "hybrid: modules to train in full", nargs="+", metavar="NAME")
    add("--seed", "decides the order of the data and the initial LoRA matrices", type=int)
    add("--validation-examples", "how many examples the validation loss is over")
    add("--samples", "how many texts to generate before and after", type=int)
    add("--sample-tokens", "the longest of them, in tokens")
    add("--save-every", "steps between checkpoints; 0: only when stopped")
    add("--threads", "CPU threads (default: as many as torch chooses)", type=int)
    add("--device", "where to train: cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not reload the adapter through PEFT and compare logits",
    )
    return parser


def _check(options: Options) -> None:
    options.full_modules = tuple(options.full_modules)
    least = {
        **dict.fromkeys(("steps", "batch_size", "r", "alpha", "sample_tokens"), 1),
        **dict.fromkeys(("samples", "threads", "save_every"), 0),
        "validation_examples": 1,
        "max_length": 8,
    }
    for name, minimum in least.items():
        value = getattr(options, name)
        if value < minimum:
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be at least {minimum}")
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout is {options.dropout}, must be at least 0 and below 1")
    if options.learning_rate is not None and not options.learning_rate > 0:
        raise UserError(f"--learning-rate is {options.learning_rate}, must be above 0")
    if options.full_modules and options.method != "hybrid" and not options.compare:
        raise UserError("--full-modules is for --method hybrid")
    if options.compare and options.resume:
        raise UserError("--compare and --resume exclude each other")


def lasting(options: Options) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: values[name] for name in LASTING} | {"full_modules": [*options.full_modules]}


def take_over(options: Options, given: set[str], saved: dict[str, Any]) -> None:
    """Resuming: options that were not given come from the checkpoint, the others must agree."""
    asked = lasting(options)
    for name, value in saved.items():
        if name in given and asked[name] != value:
            raise UserError(
                f"--resume: the checkpoint in {options.out} has {name.replace('_', '-')} {value}, "
                f"but --{name.replace('_', '-')} {asked[name]} was given"
            )
        setattr(options, name, tuple(value) if name == "full_modules" else value)
