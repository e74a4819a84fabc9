"""Fine-tune a language model with QLoRA, from data to a checked adapter, on a CPU if need be.

    python examples/finetune_qlora.py                     SmolLM2-135M learns to document Python
    python examples/finetune_qlora.py --data my.jsonl --model path/to/a/causal-lm
    python examples/finetune_qlora.py --method full       lora, hybrid, full, peft: see --help
    python examples/finetune_qlora.py --compare           all of them, in one table

Ctrl-C saves the adapter and a checkpoint, and `--resume` goes on from it. What happens is in `run`;
the files beside this one do one part each.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

# `make` sets PYTHONSAFEPATH, under which a script's own folder is not searched.
sys.path.append(str(Path(__file__).resolve().parent))

from _data import load_examples, split_examples
from _errors import UserError
from _options import Options, parse_options, take_over
from _phases import Phases

DOCSTRINGS = "the docstrings of the standard library"
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(argv: list[str] | None = None) -> int:
    try:
        options, given = parse_options(argv)
        if options.compare:
            from _compare import compare

            return compare(options)
        return run(options, given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. What was saved before is in place.", file=sys.stderr)
        return INTERRUPTED


def run(options: Options, given: set[str]) -> int:
    phases = Phases()

    # 1. Examples. They are read before torch is imported, so that a bad file fails at once.
    with phases("data", f"Reading {options.data or DOCSTRINGS}"):
        split = split_examples(load_examples(options.data))
    saved = None
    if options.resume:
        from _checkpoint import read_state

        saved = read_state(options.out)
        take_over(options, given, saved["options"])

    # 2. The model, quantized, with LoRA; a checkpoint's state on top when resuming.
    with phases("model", "Loading the model"):
        from _job import Job
        from _report import announce, report_result, report_stop, write_summary

        job = Job(options, split, saved)
    announce(job)

    # 3. Where it stands before the first step.
    if not job.before:
        with phases("before", "Validation before training"):
            job.before = job.measure()

    # 4. Training, and at once what it was for.
    with phases("training"):
        finished = job.train()
        exported = job.export()
    if not finished:
        write_summary(job, exported, None, None, phases)
        report_stop(job, exported, resume_command(options))
        return INTERRUPTED

    # 5. Where it stands now, and whether PEFT reads the adapter as the same model.
    with phases("after", "Validation after training"):
        after = job.measure()
    check = {"skipped": "--no-check"}
    if options.check:
        with phases("check", "Reloading the adapter through PEFT"):
            check = job.check(exported)
    write_summary(job, exported, after, check, phases)
    report_result(job, exported, after, check, phases)
    return 0 if check.get("agrees", True) else 1


def resume_command(options: Options) -> str:
    python = os.path.relpath(sys.executable)
    words = [python if not python.startswith("..") else sys.executable, sys.argv[0]]
    words += ["--out", str(options.out), "--resume"]
    for name in ("model", "data"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
