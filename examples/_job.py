"""One training job: everything that the options stand for, built and ready to run."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _batches import Encoder, collate, encode_all, training_batches, validation_batches
from _bundled_model import bundled_model
from _checkpoint import restore_checkpoint, save_checkpoint
from _data import Example, fingerprint
from _errors import UserError
from _memory import MemoryMeter
from _methods import (
    METHODS,
    LoraOptions,
    build,
    check_model_folder,
    chosen_kernels,
    count_parameters,
    frozen_bytes,
    load_tokenizer,
    model_fingerprint,
    quiet_libraries,
    save_trained,
    trainable,
)
from _options import Options, lasting
from _train import CompletionLoss, History, generate, make_optimizer, train, validate
from _verify import compare_with_peft, completion_logits, missing_library

CHECKED_EXAMPLES = 4  # whose logits are compared with PEFT's


class Job:
    def __init__(
        self,
        options: Options,
        split: tuple[list[Example], list[Example]],
        saved: dict[str, Any] | None,
    ) -> None:
        """`saved`: the state of the checkpoint to go on from. It is restored here."""
        quiet_libraries()
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.device = _usable_device(options.device)
        self.folder = check_model_folder(options.model) if options.model else bundled_model()
        self.identity = {
            "model": model_fingerprint(self.folder),
            "data": fingerprint([*split[0], *split[1]]),
        }
        self._check_identity(saved)
        self.model_name = self.folder.resolve().name
        self.base_parameters = count_parameters(self.folder)

        train_examples, validation = split
        self.held_out = len(validation)
        self.validation_examples = validation[: options.validation_examples]
        tokenizer = load_tokenizer(self.folder)
        self.encoder = Encoder(tokenizer, options.max_length)
        self.pad = tokenizer.pad_token_id or 0
        self.train_items, dropped = encode_all(self.encoder, train_examples, "training")
        items, dropped_too = encode_all(self.encoder, self.validation_examples, "validation")
        self.dropped = dropped + dropped_too
        self.validation_items = items
        self.checked_batch = collate(items[:CHECKED_EXAMPLES], self.pad)
        self.validation = validation_batches(items, options.batch_size, self.pad)

        self.meter = MemoryMeter(self.device)
        self.memory = {"libraries": self.meter.start_phase()}
        torch.manual_seed(options.seed)
        self.lora = LoraOptions(options.r, options.alpha, options.dropout, options.full_modules)
        self.model = build(self.folder, options.method, self.lora, self.device)
        self.loss = CompletionLoss(self.model)
        self.trained = trainable(self.model)
        self.trained_parameters = sum(parameter.numel() for _, parameter in self.trained)
        self.frozen_bytes = frozen_bytes(self.model)
        self.kernels = chosen_kernels(self.model)
        self.rate = options.learning_rate or METHODS[options.method].learning_rate
        self.optimizer = make_optimizer(self.trained, self.rate)

        self.history = History()
        if saved is None:
            self.before: dict[str, Any] = {}
        else:
            restore_checkpoint(options.out, self.trained, self.optimizer)
            self.history = History(**saved["history"])
            self.before = saved["before"]
            self.memory["peak_of_earlier_runs"] = saved["peak"]

    def _check_identity(self, saved: dict[str, Any] | None) -> None:
        for name, value in self.identity.items():
            if saved is not None and saved[name] != value:
                raise UserError(
                    f"--resume: the checkpoint in {self.options.out} was trained with another "
                    f"{name} ({saved[name]}) than this one ({value})"
                )

    def measure(self) -> dict[str, Any]:
        """Validation loss and samples of the model as it is now."""
        asked = [e for e in self.validation_examples if e.prompt] or self.validation_examples
        samples = asked[: self.options.samples]
        texts = generate(self.model, self.encoder, samples, self.options.sample_tokens)
        loss = validate(self.loss, self.validation)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 100.0)),
            "samples": [
                {"prompt": e.prompt, "expected": e.completion, "written": text}
                for e, text in zip(samples, texts, strict=True)
            ],
        }

    def train(self) -> bool:
        """Trains to the last step; False if it was stopped before."""
        options, history = self.options, self.history
        batches = training_batches(
            self.train_items, options.batch_size, options.seed, self.pad, start=history.step
        )
        self.memory["before_training"] = self.meter.start_phase()
        try:
            return train(
                self.loss,
                self.optimizer,
                batches,
                history,
                options.steps,
                self.rate,
                self.meter,
                options.save_every,
                self.save,
            )
        finally:
            self.memory["peak"] = max(self.meter.peak(), self.memory.pop("peak_of_earlier_runs", 0))

    def save(self) -> None:
        state = {
            **self.identity,
            "options": lasting(self.options),
            "history": asdict(self.history),
            "before": self.before,
            "peak": max(self.meter.peak(), self.memory.get("peak_of_earlier_runs", 0)),
        }
        save_checkpoint(self.options.out, self.trained, self.optimizer, state)

    def export(self) -> Path:
        return save_trained(self.model, self.options.method, self.options.out)

    def check(self, adapter: Path) -> dict[str, Any]:
        """Holds the saved adapter, reloaded through PEFT, against the model in memory."""
        method = self.options.method
        reason = missing_library(method)
        if reason is not None:
            return {"skipped": reason}
        ours = completion_logits(self.loss, self.checked_batch)
        return compare_with_peft(
            ours, self.checked_batch, self.folder, adapter, method, self.lora, self.device
        )


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason})") from None
    return device
