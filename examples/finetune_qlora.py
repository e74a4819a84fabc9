"""Fine-tune a language model with QLoRA, from data to a checked adapter; a CPU is enough.

    python examples/finetune_qlora.py                     SmolLM2-135M learns to document Python
    python examples/finetune_qlora.py --data my.jsonl --model path/to/a/causal-lm
    python examples/finetune_qlora.py --method full       lora, dora, adapter, ...: see --help
    python examples/finetune_qlora.py --compare           all methods, in one table

Ctrl-C saves the adapter and a checkpoint; `--resume` goes on from there. `finetune` is the whole
story; each file beside this one does one part of it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

# `make` sets PYTHONSAFEPATH, which keeps a script's own folder out of the search.
sys.path.append(str(Path(__file__).resolve().parent))

from _data import encode, fingerprint, grouped_by_length, load_examples, split_examples
from _options import LASTING, RESUMABLE, UserError, parse_options

INTERRUPTED = 130  # the exit code that a shell reports after Ctrl-C


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse_options(argv)
        if options.compare:
            from _compare import compare

            return compare(options)
        return finetune(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. What was saved before is in place.", file=sys.stderr)
        return INTERRUPTED


def finetune(options: argparse.Namespace) -> int:
    started = time.perf_counter()

    # 1. The data. It is read before torch is imported, so that a bad file fails at once.
    print(f"Reading {options.data or 'the docstrings of the standard library'} ...", flush=True)
    examples = load_examples(options.data)
    train_examples, held_out = split_examples(examples)
    validation_examples = held_out[: options.validation_examples]

    # 2. The model: loaded, quantized, with LoRA added.
    print("Loading the model ...", flush=True)
    import torch
    from _methods import build_model, save, switch_seconds
    from _model import (
        bundled_model,
        check_model_folder,
        compute_dtype,
        load_tokenizer,
        model_fingerprint,
        quiet_libraries,
        usable_device,
    )
    from _report import Report, write_json
    from _training import make_trainer, measure, reset_peak_memory, train

    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = usable_device(options.device)
    dtype = compute_dtype(device)
    folder = check_model_folder(options.model) if options.model else bundled_model()
    job = {
        "model": model_fingerprint(folder),
        "data": fingerprint(examples),
        "options": {name: getattr(options, name) for name in LASTING},
    }
    refuse_another_job(options, job)
    tokenizer = load_tokenizer(folder)
    encoded, left_out = encode(tokenizer, train_examples, options.max_length)
    train_items = grouped_by_length(encoded, options.batch_size, options.seed)
    validation_items, left_out_too = encode(tokenizer, validation_examples, options.max_length)
    validation_items.sort(key=lambda item: len(item["input_ids"]))

    memory = {"libraries": reset_peak_memory(device)}
    torch.manual_seed(options.seed)
    model, parameters = build_model(folder, dtype, device, options)
    report = Report(options, model, parameters, folder, dtype, memory, started)
    report.announce(len(train_items), len(validation_items), len(held_out), left_out + left_out_too)

    # 3. Training, with the validation loss before it.
    trainer = make_trainer(model, tokenizer, train_items, validation_items, options, dtype)
    if options.resume:
        job["before"] = options.job["before"]
    else:
        print("Validation before training ...", flush=True)
        job["before"] = measure(trainer, tokenizer, validation_examples, options)
        start_checkpoints(options.out / "checkpoints", job, write_json)
    memory["before_training"] = reset_peak_memory(device)
    torch.manual_seed(options.seed)
    finished = train(trainer, options.checkpoint)

    # 4. What was trained is saved: an adapter in PEFT's format, or the whole model.
    saved = save(model, options)
    if not finished:
        report.write(trainer.state, job["before"], saved, after=None, check=None)
        report.stopped(trainer.state, saved, resume_command(options))
        return INTERRUPTED

    # 5. The validation loss after training, and PEFT as a witness that the adapter is right.
    print("Validation after training ...", flush=True)
    after = measure(trainer, tokenizer, validation_examples, options)
    if options.no_check:
        check = {"skipped": "--no-check"}
    else:
        from _compare import check_with_peft

        batches = [trainer.data_collator([item]) for item in validation_items[:4]]
        check = check_with_peft(model, batches, saved, folder, dtype, device, options)
    switch = switch_seconds(model, saved, options) if options.measure_switch else None
    report.write(trainer.state, job["before"], saved, after, check, switch)
    report.finished(trainer.state, job["before"], saved, after, check)
    return 0 if check.get("agrees", True) else 1


# --- resuming -------------------------------------------------------------------------------------


def refuse_another_job(options: argparse.Namespace, job: dict[str, Any]) -> None:
    for name in ("model", "data"):
        if options.resume and options.job[name] != job[name]:
            raise UserError(
                f"--resume: the checkpoint in {options.out} was trained with another {name} "
                f"({options.job[name]}) than this one ({job[name]})"
            )


def start_checkpoints(folder: Path, job: dict[str, Any], write_json: Any) -> None:
    """Removes the checkpoints of an earlier run, and writes down what this one is."""
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
    write_json(folder / "job.json", job)


def resume_command(options: argparse.Namespace) -> str:
    """Returns the command that goes on with this run, or "" if the method cannot be resumed."""
    if options.method not in RESUMABLE:
        return ""
    python = os.path.relpath(sys.executable)
    words = [python if not python.startswith("..") else sys.executable, sys.argv[0]]
    words += ["--out", str(options.out), "--resume"]
    for name in ("model", "data"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
