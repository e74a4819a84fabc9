"""The training loop, the loss, and how a run is stopped."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from _batches import IGNORED, Batch, Encoder
from _data import Example
from _errors import UserError
from _memory import MemoryMeter
from torch import nn
from tqdm import tqdm

WARMUP_SHARE = 0.1
FINAL_RATE = 0.1  # of the highest learning rate
MAX_GRAD_NORM = 1.0
GIVE_BACK_EVERY = 10  # steps; at every step the pages fetched anew cost a quarter of the speed


@dataclass
class History:
    """What a run has done so far; a checkpoint holds it as JSON."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class CompletionLoss:
    """Cross entropy over the completion's tokens.

    Logits over a large vocabulary are the biggest tensors of a step. The output head is handed only
    the hidden states from which a completion token is predicted, usually a quarter of them.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("--model: the model has no output head, must be a causal LM")
        self.model = model
        self.device: torch.device = head.weight.device
        self._wanted: torch.Tensor | None = None
        head.register_forward_pre_hook(self._select)

    def _select(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        if self._wanted is None:
            return None  # a call that is not ours, for instance from generate
        return (inputs[0].flatten(0, -2)[self._wanted],)

    def logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, labels) of the completion's tokens: [tokens, vocabulary], [tokens]."""
        batch = batch.to(self.device)
        labels = batch.labels.flatten()
        self._wanted = (labels != IGNORED).nonzero().squeeze(1)
        try:
            with torch.autocast(self.device.type, torch.bfloat16):
                output = self.model(input_ids=batch.input_ids, use_cache=False)
            return output.logits, labels[self._wanted]
        finally:
            self._wanted = None

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(sum of the losses, number of tokens it is over)."""
        logits, labels = self.logits(batch)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


def evaluation_mode(model: nn.Module) -> None:
    """`model.eval()`, but not for bitsandbytes' layers: on some CPUs their first call in eval mode
    repacks the weight for good, in a form that cannot be trained over, with absmax in bf16. Nothing
    else in them depends on the mode."""
    model.eval()
    for module in model.modules():
        if type(module).__module__ == "bitsandbytes.nn.modules":
            module.training = True


@torch.no_grad()
def validate(loss: CompletionLoss, batches: Sequence[Batch]) -> float:
    """Mean loss of a completion token."""
    evaluation_mode(loss.model)
    total, count = 0.0, 0
    for batch in batches:
        batch_loss, tokens = loss(batch)
        total, count = total + batch_loss.item(), count + tokens
    return total / count


@torch.no_grad()
def generate(
    model: Any, encoder: Encoder, examples: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """What the model writes for each example's prompt, greedily."""
    if not examples:
        return []
    evaluation_mode(model)
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = "left"
    # A text without a prompt is continued from its first words.
    prompts = [encoder.prompt_text(e) or " ".join(e.completion.split()[:5]) for e in examples]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    device = model.get_output_embeddings().weight.device
    inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    with torch.autocast(device.type, torch.bfloat16):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    written = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def make_optimizer(
    trained: Sequence[tuple[str, nn.Parameter]], learning_rate: float
) -> torch.optim.Optimizer:
    parameters = [parameter for _, parameter in trained]
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


def scheduled_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2)


class StopSignal:
    """Ctrl-C, or a scheduler's SIGTERM, lets the step in hand finish; a second one does not."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("\nStopping after this step. Ctrl-C again stops at once.", file=sys.stderr)

    @contextmanager
    def watching(self) -> Iterator[StopSignal]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(
    loss: CompletionLoss,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    history: History,
    steps: int,
    learning_rate: float,
    meter: MemoryMeter,
    save_every: int,
    save: Callable[[], None],
) -> bool:
    """Trains from `history.step` to `steps`; False if it was stopped before. Saves when stopped, at
    every `save_every`th step and at the end; 0: only when stopped."""
    model = loss.model
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # In a log file every refresh is a line of its own.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=steps, initial=history.step, desc="training", unit="step", mininterval=interval
    )
    with StopSignal().watching() as stop, bar:
        while history.step < steps and not stop.requested:
            batch = next(batches)
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = scheduled_rate(history.step, steps, learning_rate)
            total, count = loss(batch)
            mean = total / count
            mean.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = mean.item()
            if not math.isfinite(value):
                raise UserError(
                    f"the loss is {value} at step {history.step + 1}: "
                    f"--learning-rate {learning_rate} is too high for this model or data"
                )
            if history.step % GIVE_BACK_EVERY == GIVE_BACK_EVERY - 1:
                meter.give_back()
            history.seconds += time.perf_counter() - started
            history.tokens += batch.tokens
            history.losses.append(value)
            history.step += 1
            bar.set_postfix_str(
                f"loss {value:.3f}, {history.tokens_per_second:.0f} tokens/s, "
                f"{meter.peak() / 2**20:.0f} MiB",
                refresh=False,
            )
            bar.update()
            due = save_every and (history.step % save_every == 0 or history.step == steps)
            if due or stop.requested:
                save()
        return history.step == steps
