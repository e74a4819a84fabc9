"""`python -m benchmarks models`: measures whole models, writes models.json and prints a table.

In each round every contender takes a turn, in a new random order. A contender is first checked:
`pylora.accelerate` compares the first call of each layer with float64.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks import machine
from benchmarks.models import results
from benchmarks.models.contenders import CONTENDERS, RANK
from benchmarks.models.families import FAMILIES
from benchmarks.models.measure import Decoding, Training, model_bytes
from benchmarks.models.results import DENSE_PEER, PEER
from benchmarks.models.table import models_table
from benchmarks.statistics import rounds, summarize

# The families are measured at a hidden size of 512, with 32 sequences in a batch.
SCALE, REPEAT = 8, 16
_LEAST, _MOST = 3, 30


@dataclass(frozen=True)
class Job:
    """A model to measure.

    build        makes it, dense, in float32, with random weights
    inputs       the batch of a training step
    output       the attribute of what its forward returns that is trained
    targets      the layers that get LoRA
    vocabulary   if it is a causal language model, the number of its tokens; otherwise 0
    """

    build: Callable[[], Any]
    inputs: Mapping[str, torch.Tensor]
    output: str
    targets: str | list[str]
    vocabulary: int


def _llama(tokens: int, **settings: Any) -> Job:
    """A Llama with these settings and random weights, and one sequence of so many tokens."""
    config = transformers.LlamaConfig(max_position_embeddings=8192, **settings)
    ids = torch.arange(tokens)[None] * 97 % config.vocab_size
    return Job(
        lambda: transformers.LlamaForCausalLM(config),
        {"input_ids": ids, "labels": ids},
        "loss",
        "all-linear",
        config.vocab_size,
    )


def smollm2() -> Job:
    """SmolLM2-135M with random weights, and one sequence of 256 tokens."""
    return _llama(
        256,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def llama_3_8b_block() -> Job:
    """One decoder layer of Llama-3 8B, attention and MLP, with random weights, and one sequence of
    2,048 tokens. The vocabulary is small, so that the head does not hide the layer."""
    return _llama(
        2048,
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


# These models are measured in their own size; the families are small.
WHOLE = {"smollm2-135m": smollm2, "llama-3-8b-block": llama_3_8b_block}


def default_dtype(facts: Mapping[str, Any]) -> torch.dtype:
    """bfloat16, or float32 on a CPU without instructions for bfloat16, where torch is far slower
    in it than in float32."""
    fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(facts["flags"])
    fast = fast or facts["device"] != "cpu"
    return torch.bfloat16 if fast else torch.float32


def jobs(names: list[str] | None, dtype: torch.dtype, on_gpu: bool = False) -> dict[str, Job]:
    """The models with these names; by default all that the device can train in seconds. Raises
    ValueError for an unknown name."""
    known = [*WHOLE, *FAMILIES]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--model is {name!r}; it must be one of {', '.join(known)}")
    chosen = {}
    too_large = () if on_gpu else ("llama-3-8b-block",)
    for name in names or [name for name in known if name not in too_large]:
        if name in FAMILIES:
            family = FAMILIES[name]
            inputs = family.inputs(dtype, REPEAT)
            # Mamba has a cache of its own kind.
            decodes = family.model.endswith("ForCausalLM") and name != "mamba"
            vocabulary = family.settings["vocab_size"] if decodes else 0
            build = lambda family=family: family.build(SCALE)  # noqa: E731
            chosen[name] = Job(build, inputs, family.output, family.targets, vocabulary)
        else:
            chosen[name] = WHOLE[name]()
    return chosen


def run(arguments: argparse.Namespace) -> int:
    """Measures the models. Returns 1 if a contender of ours failed, which a peer may do."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    facts = machine.machine(device)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(facts)
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    # These facts are taken before this run loads the machine and adds files to the checkout.
    run: dict[str, Any] = {
        "schema": results.SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "seconds": arguments.seconds,
        "rank": RANK,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": facts,
        "versions": machine.versions(),
        "commit": machine.commit(),
        "models": [],
    }
    path: Path = arguments.out / results.FILE
    bar = tqdm(jobs(arguments.model, dtype, device.type == "cuda").items(), unit="model")
    for name, job in bar:
        bar.set_description(name)
        run["models"].append(_measure(name, job, dtype, device, seed, arguments.seconds))
        results.save(path, run)  # a run that is cut off keeps what it measured
    print(models_table(run))
    print(f"\nwrote {path}")
    results_of_all = [result for model in run["models"] for result in model["results"]]
    failed = {r["contender"] for r in results_of_all if "token_error" in r}
    return 1 if failed - {PEER, DENSE_PEER} else 0


def _measure(
    name: str, job: Job, dtype: torch.dtype, device: torch.device, seed: int, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(seed)
    dense = job.build().to(dtype)
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    inputs = {key: value.to(device) for key, value in job.inputs.items()}
    trainings: dict[str, Training] = {}
    found: dict[str, dict[str, Any]] = {}
    for contender in CONTENDERS:
        found[contender.name] = {"contender": contender.name, "note": ""}
        try:
            model = contender.build(copy.deepcopy(dense).to(device), job.targets)
        except ValueError as error:
            found[contender.name]["note"] = f"refused: {error}"
            continue
        training = Training(model, inputs, job.output)
        peer = trainings.get(PEER)
        if peer is not None and training.trainable != peer.trainable:
            found[contender.name]["note"] = (
                f"left out, since it trains {training.trainable} parameters and PEFT "
                f"{peer.trainable}"
            )
            continue
        training.step()  # the optimizer makes its state, and layers are checked
        trainings[contender.name] = training
        found[contender.name]["trainable"] = training.trainable
        found[contender.name]["model_bytes"] = model_bytes(model)
        found[contender.name]["peak_bytes"] = training.peak_bytes()
    steps = {n: training.seconds for n, training in trainings.items()}
    for contender_name, summary in _timed(steps, seed, seconds).items():
        found[contender_name]["step"] = summary
    if job.vocabulary:
        # It comes last: on some CPUs bitsandbytes repacks its weights when it decodes.
        decoding = {n: Decoding(t.model, job.vocabulary).seconds for n, t in trainings.items()}
        for contender_name in list(decoding):
            try:
                decoding[contender_name]()
            except Exception as error:  # a peer that cannot decode does not end the run
                found[contender_name]["token_error"] = str(error)
                del decoding[contender_name]
        for contender_name, summary in _timed(decoding, seed, seconds).items():
            found[contender_name]["token"] = summary
    del trainings, steps
    gc.collect()
    return {"model": name, "tokens": _tokens(job), "results": list(found.values())}


def _tokens(job: Job) -> int:
    """The tokens of a batch of text; for other inputs, its examples."""
    ids = job.inputs.get("input_ids")
    return next(iter(job.inputs.values())).shape[0] if ids is None else ids.numel()


def _timed(
    calls: Mapping[str, Callable[[], float]], seed: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Gives every contender the same number of samples, which take about `seconds` together."""
    if not calls:
        return {}
    once = sum(call() for call in calls.values())
    count = max(_LEAST, min(_MOST, int(seconds / once)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in rounds(dict.fromkeys(calls, count), seed):
        for name in turn:
            samples[name].append(calls[name]())
    return {name: asdict(summarize(times)) for name, times in samples.items()}
