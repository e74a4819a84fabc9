"""Measures a model: a training step, a decoded token, and the peak memory of a step.

The peak is that of what torch's allocator hands out while a step runs, beside what the model holds
before it. On a CPU torch's profiler records each allocation, so the number is the same in each run;
workspaces inside a kernel, which are at most a few MiB, are not seen. On CUDA the allocator counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import cuda_extra

_DECODED = 8  # tokens of a sample
_PROMPT = 8


class Training:
    """A model with its optimizer and a batch to train on.

    A model in bfloat16 trains under autocast, as mixed-precision loops do.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], output: str) -> None:
        self.model, self._inputs, self._output = model.train(), inputs, output
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self._device, self._around = _autocast(model)

    def step(self) -> None:
        """Forward, backward and an update."""
        with self._around():
            output = getattr(self.model(**self._inputs), self._output)
        (output if output.dim() == 0 else output.float().square().mean()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def seconds(self) -> float:
        """The time of a step."""
        return _seconds(self.step, self._device)

    def peak_bytes(self) -> int:
        """The peak extra memory of a step."""
        return cuda_extra(self.step) if self._device.type == "cuda" else tracked_peak(self.step)


class Decoding:
    """A causal language model that decodes greedily, one sequence, with a cache."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.model = model
        self._device, self._around = _autocast(model)
        self._prompt = torch.arange(3, 3 + _PROMPT, device=self._device)[None] % vocabulary
        self._token = self._prompt[:, :1]

    @torch.no_grad()
    def seconds(self) -> float:
        """The time of a token, after the prompt."""
        self.model.eval()
        with self._around():
            cache = self.model(input_ids=self._prompt, use_cache=True).past_key_values

            def decode() -> None:
                for _ in range(_DECODED):
                    self.model(input_ids=self._token, past_key_values=cache, use_cache=True)

            return _seconds(decode, self._device) / _DECODED


def _autocast(model: nn.Module) -> tuple[torch.device, Callable[[], Any]]:
    first = next(p for p in model.parameters() if p.is_floating_point())
    mixed = any(p.dtype == torch.bfloat16 for p in model.parameters())
    return first.device, partial(torch.autocast, first.device.type, torch.bfloat16, enabled=mixed)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def tracked_peak(run: Callable[[], Any]) -> int:
    """The highest sum of the bytes that torch's CPU allocator handed out during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def model_bytes(model: nn.Module) -> int:
    """The bytes that the model holds in parameters and buffers, and the states of bitsandbytes."""
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        held = [tensor]
        state: Any = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                held += [part.absmax, part.code]
        for each in held:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
