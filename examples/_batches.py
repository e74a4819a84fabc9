"""From examples to tensors: chat template, loss on the completion alone, batches of like length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _data import Example
from _errors import UserError
from jinja2.exceptions import TemplateError

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """Token ids; those from `completion_start` on are the ones to learn."""

    ids: tuple[int, ...]
    completion_start: int


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # int64 [batch, length], padded on the right
    labels: torch.Tensor  # int64 [batch, length], already shifted: the token that comes next
    tokens: int  # without the padding

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.labels.to(device), self.tokens)


class Encoder:
    """Writes an example the way the model expects it: its chat template, or plain lines."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.has_template = bool(tokenizer.chat_template)
        self.takes_system = self.has_template and self._accepts_system_role()

    def _accepts_system_role(self) -> bool:
        try:
            self._render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
        except TemplateError:  # some templates raise on any role but user and assistant
            return False
        return True

    def _render(self, messages: list[dict[str, str]], generation: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )

    def prompt_text(self, example: Example) -> str:
        """All that the model is given before it writes the completion."""
        if not example.prompt:
            return ""
        if self.takes_system and example.system:
            messages = [{"role": "system", "content": example.system}]
            messages.append({"role": "user", "content": example.prompt})
            return self._render(messages, generation=True)
        prompt = "\n".join(filter(None, (example.system, example.prompt)))
        if self.has_template:
            return self._render([{"role": "user", "content": prompt}], generation=True)
        return (self.tokenizer.bos_token or "") + prompt + "\n"

    def encode(self, examples: Sequence[Example]) -> list[list[Encoded]]:
        """One list of pieces for each example: a long text gives several, an example whose prompt
        and completion do not fit gives none, since half an answer is not what should be learnt."""
        if not examples:
            return []
        prompts = self._ids([self.prompt_text(example) for example in examples])
        completions = self._ids([example.completion for example in examples])
        end = self.tokenizer.eos_token_id
        encoded = []
        for example, prompt, completion in zip(examples, prompts, completions, strict=True):
            completion = [*completion, end] if end is not None else completion
            if not example.prompt:
                encoded.append(self._pieces(completion))
            elif len(prompt) + len(completion) <= self.max_length:
                encoded.append([Encoded((*prompt, *completion), len(prompt))])
            else:
                encoded.append([])
        return encoded

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _pieces(self, ids: list[int]) -> list[Encoded]:
        bos = self.tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        step = self.max_length - len(start)
        pieces = [ids[i : i + step] for i in range(0, len(ids), step)]
        # The first token of all has nothing before it to be predicted from.
        return [Encoded((*start, *piece), 1) for piece in pieces if len(start) + len(piece) > 1]


def encode_all(
    encoder: Encoder, examples: Sequence[Example], what: str
) -> tuple[list[Encoded], int]:
    """(every piece that fits, how many examples were left out). An error when nothing fits, so that
    no empty training starts."""
    groups = encoder.encode(examples)
    pieces = [piece for group in groups for piece in group]
    if not pieces:
        raise UserError(
            f"none of the {len(examples)} {what} examples fits into --max-length "
            f"{encoder.max_length}, which must be larger"
        )
    return pieces, sum(not group for group in groups)


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Pads on the right. Under a causal mask no token sees the padding that follows it, so there is
    no need of an attention mask."""
    length = max(len(item.ids) for item in items)
    input_ids = torch.full((len(items), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(items), length), IGNORED, dtype=torch.int64)
    for row, item in enumerate(items):
        ids = torch.tensor(item.ids)
        input_ids[row, : len(ids)] = ids
        labels[row, item.completion_start - 1 : len(ids) - 1] = ids[item.completion_start :]
    return Batch(input_ids, labels, sum(len(item.ids) for item in items))


def training_batches(
    items: Sequence[Encoded], batch_size: int, seed: int, pad_id: int, start: int = 0
) -> Iterator[Batch]:
    """Endless batches from number `start` on: a function of the seed alone, which is all that a
    resumed run needs. Each epoch is shuffled; within pools of eight batches, examples of like
    length are put together, which leaves little padding and the order still random."""
    number, epoch = 0, 0
    while True:
        order = list(range(len(items)))
        shuffler = random.Random(f"{seed}/{epoch}")
        shuffler.shuffle(order)
        batches = []
        pool_size = 8 * batch_size
        for i in range(0, len(order), pool_size):
            pool = sorted(order[i : i + pool_size], key=lambda index: len(items[index].ids))
            groups = [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
            shuffler.shuffle(groups)
            batches += groups
        for batch in batches:
            if number >= start:
                yield collate([items[index] for index in batch], pad_id)
            number += 1
        epoch += 1


def validation_batches(items: Sequence[Encoded], batch_size: int, pad_id: int) -> list[Batch]:
    by_length = sorted(items, key=lambda item: len(item.ids))
    groups = (by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size))
    return [collate(group, pad_id) for group in groups]
