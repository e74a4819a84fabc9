"""Train three bottleneck adapters on one NF4 model, then swap and compose them per request.

    python examples/multi_task_adapters.py            # the bundled SmolLM2-135M
    python examples/multi_task_adapters.py --short    # a few steps, for a quick check

The three tasks are made of the standard library's docstrings, so the data is on every machine. All
three get the same prompt, a function's signature, and no word about what to do: the adapter alone
knows the task.

    summary    the first sentence of the docstring
    module     the module in which the function is
    arguments  how many arguments it takes

The script prints the loss of each task with each adapter, what compositions of them do, how long a
switch takes, and how much memory an adapter takes.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import torch
from _data import (
    Example,
    completion_collator,
    encode,
    grouped_by_length,
    load_examples,
    prompt_text,
    split_examples,
)
from _model import (
    bundled_model,
    compute_dtype,
    frozen_bytes,
    load_model,
    load_tokenizer,
    quiet_libraries,
    usable_device,
)
from _report import print_table

import pylora

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def module(example: Example) -> str:
    return example.prompt.partition(".")[0]


def arguments(example: Example) -> str:
    inside = example.prompt.partition("(")[2][:-1]
    count = len([part for part in inside.split(", ") if part and part not in ("/", "*")])
    return f"{NUMBERS[count] if count < len(NUMBERS) else 'many'} arguments"


TASKS: dict[str, Callable[[Example], str]] = {
    "summary": lambda example: example.completion,
    "module": module,
    "arguments": arguments,
}


def examples_of(
    task: str, functions: Sequence[Example], limit: int
) -> tuple[list[Example], list[Example]]:
    """The training and the validation examples of a task."""
    made = [replace(e, completion=TASKS[task](e), system="") for e in functions]
    train, validation = split_examples(made)
    return train, validation[:limit]


class Job:
    """A model, its tokenizer, and the batches of the tasks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        folder = bundled_model() if options.model is None else options.model
        device = usable_device(options.device)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, compute_dtype(device), device)
        pylora.quantize_model(self.model, double_quant=True)
        self.collate = completion_collator(self.tokenizer)
        self.train: dict[str, list[Any]] = {}
        self.validation: dict[str, list[Any]] = {}
        self.shown: dict[str, Example] = {}
        functions = [e for e in load_examples(None) if re.fullmatch(r"[\w.]+\(.*\)", e.prompt)]
        for task in TASKS:
            train, validation = examples_of(task, functions, options.validation_examples)
            self.train[task], _ = encode(self.tokenizer, train, options.max_length)
            self.validation[task], _ = encode(self.tokenizer, validation, options.max_length)
            self.shown[task] = validation[0]

    def batches(self, items: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
        size = self.options.batch_size
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        device = self.model.device
        return [
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
            for made in map(self.collate, groups)
        ]

    def train_on(self, items: Sequence[Any]) -> None:
        """Trains the parameters that are trainable, by AdamW with a rate that falls to zero."""
        order = grouped_by_length(items, self.options.batch_size, seed=0)
        steps = self.options.steps
        batches = self.batches(order[: steps * self.options.batch_size])
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.options.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
        self.model.train()
        for batch in batches:
            self.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.model.eval()

    @torch.no_grad()
    def loss(self, task: str) -> float:
        """The mean loss of a token of the task's answers, with the adapters that are active."""
        total, tokens = 0.0, 0
        for batch in self.batches(self.validation[task]):
            count = int((batch["labels"] != -100).sum())
            total += float(self.model(**batch).loss) * count
            tokens += count
        return total / tokens

    def answers(self, examples: Sequence[Example]) -> list[str]:
        prompts = [prompt_text(self.tokenizer, example) for example in examples]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        output = self.model.generate(
            input_ids=inputs["input_ids"].to(self.model.device),
            attention_mask=inputs["attention_mask"].to(self.model.device),
            max_new_tokens=16,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        written = output[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def switch_time(switch: Callable[[str], object]) -> float:
    """The median of the seconds that a switch to the adapter of another task takes."""
    seconds = []
    for _ in range(20):
        for task in TASKS:
            start = time.perf_counter()
            switch(task)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the example; returns what it has printed."""
    options = parse_options(argv)
    quiet_libraries()
    torch.manual_seed(0)
    job = Job(options)
    model, base_bytes = job.model, frozen_bytes(job.model.requires_grad_(False))
    config = pylora.PfeifferConfig(reduction_factor=options.reduction_factor)
    losses: dict[str, dict[str, float]] = {"no adapter": {task: job.loss(task) for task in TASKS}}

    for task in TASKS:
        pylora.add_adapter(model, task, config)
        pylora.train_adapter(model, task)
        start = time.perf_counter()
        job.train_on(job.train[task])
        print(f"trained {task!r} in {time.perf_counter() - start:.0f} s", flush=True)
    adapter_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)

    compositions: dict[str, Any] = {task: task for task in TASKS}
    compositions["Average"] = pylora.Average(*TASKS)
    fuse = pylora.Fuse(*TASKS)
    pylora.train_adapter(model, fuse)
    third = options.steps * options.batch_size // len(TASKS) + 1
    job.train_on([item for task in TASKS for item in job.train[task][:third]])
    compositions["Fuse"] = fuse
    for name, composition in compositions.items():
        with pylora.active_adapters(model, composition):
            losses[name] = {task: job.loss(task) for task in TASKS}

    print("\nLoss of an answer's token in each task, by what is active:")
    rows = [(n, *(f"{row[task]:.3f}" for task in TASKS)) for n, row in losses.items()]
    print_table(("", *TASKS), rows)

    with pylora.active_adapters(model, pylora.BatchSplit(*TASKS)):
        answers = job.answers([job.shown["summary"]] * len(TASKS))
    print(f"\nOne batch with three requests, {job.shown['summary'].prompt}:")
    for task, answer in zip(TASKS, answers, strict=True):
        print(f"  {task:10} {answer!r}")

    def serve(task: str) -> None:
        with pylora.active_adapters(model, task):
            pass

    request = switch_time(serve)
    lasting = switch_time(lambda task: pylora.set_active_adapters(model, task))
    share = adapter_bytes / base_bytes
    print(f"\nA switch for a request and back takes {request * 1e6:.0f} us and copies nothing.")
    print(f"One that lasts, and says what is trained from then on, takes {lasting * 1e6:.0f} us.")
    print(f"An adapter takes {adapter_bytes / 1e6:.2f} MB, {share:.1%} of the NF4 base.")
    return {"losses": losses, "answers": answers, "share": share, "switch": request}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a transformers causal LM")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=100, help="training steps for each adapter")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=96, help="in tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--reduction-factor", type=float, default=24)
    parser.add_argument("--validation-examples", type=int, default=48)
    parser.add_argument("--short", action="store_true", help="a few steps, for a quick check")
    options = parser.parse_args(argv)
    if options.short:
        options.steps, options.validation_examples = 8, 8
    return options


if __name__ == "__main__":
    main()
