"""Training with transformers' Trainer: its checkpoints, its console, Ctrl-C, memory."""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _data import IGNORED, completion_collator, prompt_text
from _methods import AllocateRanks, scored_model
from _options import PEFT_METHODS, UserError
from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

import pylora


def make_trainer(
    model: nn.Module,
    tokenizer: Any,
    train_items: Sequence[Any],
    validation_items: Sequence[Any],
    options: argparse.Namespace,
    dtype: torch.dtype,
) -> Trainer:
    arguments = TrainingArguments(
        options.out / "checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, round(0.1 * options.steps)),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=dtype == torch.bfloat16,
        use_cpu=options.device == "cpu",
        seed=options.seed,
        train_sampling_strategy="sequential",  # the items are in random order already
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 1,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        dataloader_pin_memory=options.device != "cpu",
        report_to="none",
        disable_tqdm=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would make the Trainer split batches
    trainer_class = Trainer if options.method in ("full", *PEFT_METHODS) else AdapterTrainer
    virtual_tokens = options.virtual_tokens if options.method == "prompt" else 0
    trainer = trainer_class(
        model,
        arguments,
        data_collator=completion_collator(tokenizer, virtual_tokens),
        train_dataset=train_items,
        eval_dataset=validation_items,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Console(torch.device(options.device)))
    if options.method == "adalora":
        trainer.add_callback(AllocateRanks())
    return trainer


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints keep only the adapter, not the whole model."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        pylora.save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        pylora.load_adapter(self.model, checkpoint)


class Console(ProgressCallback):
    """Shows a progress bar with loss, speed and memory, and adds the peak memory and the time of
    each step to the history.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.started = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description("training")
        if not sys.stderr.isatty():
            self.training_bar.mininterval = 10.0  # in a log file each refresh is a new line

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss is {logs['loss']} at step {state.global_step}: --learning-rate "
                f"{args.learning_rate} is too high for this model or data"
            )
        # In 40 steps QLoRA on SmolLM2 took 0.4 GiB more without this. At every step it would
        # cost a quarter of the speed.
        if state.global_step % 10 == 0:
            give_back_free_memory(self.device)
        state.log_history[-1]["peak_bytes"] = peak = peak_memory(self.device)
        state.log_history[-1]["seconds"] = self.seconds
        self.training_bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, {logs['train_tokens_per_second']:.0f} tokens/s, "
            f"{peak / 2**20:.0f} MiB",
            refresh=False,
        )


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step in hand and saves; a second signal stops at once."""

    requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step. Ctrl-C again stops at once.", file=sys.stderr)

    @contextmanager
    def watching(self) -> Iterator[StopOnSignal]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(trainer: Trainer, checkpoint: Path | None) -> bool:
    """Trains to the last step, from `checkpoint` on if given. Returns False if it was stopped."""
    if checkpoint and int(checkpoint.name.split("-")[1]) >= trainer.args.max_steps:
        # Only what follows training was interrupted. The Trainer would train one more step.
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return True
    with StopOnSignal().watching() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state.global_step == trainer.state.max_steps


# --- validation -----------------------------------------------------------------------------------


def measure(
    trainer: Trainer, tokenizer: Any, examples: Sequence[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the validation loss and some generated texts of the model as it is now."""
    asked = [example for example in examples if example.prompt] or list(examples)
    asked = asked[: options.samples]
    trainer.model.eval()
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=trainer.args.bf16):
        loss = validation_loss(trainer, scored_model(trainer.model, options.method))
        texts = generate(trainer.model, tokenizer, asked, options.sample_tokens) if asked else []
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 100.0)),
        "samples": [
            {"prompt": example.prompt, "expected": example.completion, "written": text}
            for example, text in zip(asked, texts, strict=True)
        ],
    }


def validation_loss(trainer: Trainer, model: nn.Module) -> float:
    """Returns the mean over all completion tokens. `Trainer.evaluate` averages over batches."""
    total, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens


def generate(model: Any, tokenizer: Any, examples: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Returns the texts that the model writes greedily for the examples' prompts."""
    # A text without a prompt is continued from its first words.
    prompts = [prompt_text(tokenizer, e) or " ".join(e.completion.split()[:5]) for e in examples]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    written = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


# --- memory ---------------------------------------------------------------------------------------
# On a GPU it is what torch has allocated. On a CPU it is the resident set of the process. Linux
# tells the peak since it was last set back (VmHWM); elsewhere the peak counts from the start.

STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """Returns the bytes at the highest point since `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) << 10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def reset_peak_memory(device: torch.device) -> int:
    """Gives back what is free, sets the peak back, and returns the bytes now in use."""
    gc.collect()
    give_back_free_memory(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        try:
            STATUS.with_name("clear_refs").write_text("5")  # writing "5" sets VmHWM back
        except PermissionError:
            print("The peak of memory counts from the start here: it cannot be set back.")
    return peak_memory(device)


def give_back_free_memory(device: torch.device) -> None:
    """Returns the holes that batches of many lengths leave in the CPU's heap to the system."""
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has no malloc_trim
        if trim is not None:
            trim(0)
