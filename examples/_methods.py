"""The methods: how each makes a model ready to train, saves what it trained, and switches tasks."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _model import load_model, replace_files
from _options import ADAPTER_METHODS, NF4_METHODS, PEFT_METHODS, UserError
from torch import nn
from transformers import TrainerCallback

import pylora

FIRST, SECOND = "default", "second"  # the names of the trained task and of one to switch to


def build_model(
    folder: Path, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> tuple[Any, int]:
    """Returns the model, ready to be trained by the method, and its number of parameters when
    loaded.

    QLoRA is both steps, `quantize_model` and `add_lora`; the other methods leave out or change one.
    """
    method = options.method
    if method == "full":
        model = load_model(folder, torch.float32, device)
        return model, model.num_parameters()
    if method == "peft":
        model = load_bitsandbytes_model(folder, dtype, device)
    else:
        model = load_model(folder, dtype, device)
    parameters = model.num_parameters()
    whole = trained_in_full(model, options)
    try:
        if method in NF4_METHODS and method != "peft":
            pylora.quantize_model(model, skip_modules=("lm_head", *whole), double_quant=True)
        model = add_task(model, FIRST, options)
    except ValueError as error:
        where = "--full-modules" if whole else f"--model {folder}"
        raise UserError(f"{where}: {error}") from error
    if method == "adalora":
        pylora.accelerate(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # bf16 is too coarse to add up many small steps
            parameter.data = parameter.data.float()
    return model, parameters


def add_task(model: Any, name: str, options: argparse.Namespace) -> Any:
    """Adds to the model what the method trains for one task, under `name`, and returns it."""
    if options.method in PEFT_METHODS:
        from peft import PeftModel, get_peft_model

        config = peft_config(options)
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)
        config.inference_mode = True  # PEFT refuses a second AdaLoRA adapter that can be trained
        model.add_adapter(name, config)
    elif options.method in ADAPTER_METHODS:
        config = pylora.PfeifferConfig(reduction_factor=options.reduction_factor)
        pylora.add_adapter(model, name, config)
    else:
        pylora.add_lora(
            model,
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            use_dora=options.method == "dora",
            modules_to_save=trained_in_full(model, options),
            adapter_name=name,
        )
    return model


def trained_in_full(model: Any, options: argparse.Namespace) -> Sequence[str]:
    """Returns the names of the modules that the hybrid method trains in full."""
    if options.method != "hybrid":
        return ()
    return options.full_modules or (f"model.layers.{model.config.num_hidden_layers - 1}.mlp",)


def peft_config(options: argparse.Namespace) -> Any:
    """Returns PEFT's configuration of a method that PEFT computes."""
    from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig

    if options.method == "prompt":
        # Random vectors would be far from any embedding, and the model would start broken.
        return PromptTuningConfig(
            num_virtual_tokens=options.virtual_tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
            task_type="CAUSAL_LM",
        )
    shared = {
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if options.method == "adalora":
        # It starts with half as many ranks more, and gives the least important ones up.
        return AdaLoraConfig(
            init_r=options.r + (options.r + 1) // 2,
            target_r=options.r,
            tinit=options.steps // 10,
            tfinal=options.steps * 3 // 10,
            total_step=options.steps,
            **shared,
        )
    return LoraConfig(r=options.r, **shared)


def load_bitsandbytes_model(
    folder: Path, dtype: torch.dtype, device: torch.device, skipped: Sequence[str] = ()
) -> Any:
    """Loads the NF4 base as bitsandbytes makes it: double quantization, blocks of 64."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *skipped],
    )
    model = load_model(folder, dtype, device, quantization_config=config)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # The first call in eval mode repacks the weight on some CPUs, for good and in a form
            # that cannot be trained over. Nothing else in this layer depends on the mode.
            module.train()
            module.train = lambda mode=True, module=module: module
    return model


# --- what differs in training ---------------------------------------------------------------------


class AllocateRanks(TrainerCallback):
    """Lets AdaLoRA move ranks between layers after each step, as PEFT asks of a training loop."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def scored_model(model: Any, method: str) -> nn.Module:
    """Returns the module whose loss is that of the task alone.

    AdaLoRA's model adds a penalty to the loss, which keeps its matrices orthogonal.
    """
    return model.base_model.model if method == "adalora" else model


# --- what a task takes after training -------------------------------------------------------------


def save(model: Any, options: argparse.Namespace) -> Path:
    if options.method == "full":
        # A tied weight has two names, and must be one tensor for the file to have it once.
        cast: dict[int, torch.Tensor] = {}
        weights = {
            name: cast.setdefault(value.data_ptr(), value.to(torch.bfloat16))
            for name, value in model.state_dict().items()
        }
        model.config.dtype = torch.bfloat16
        return replace_files(
            options.out / "model", lambda folder: model.save_pretrained(folder, state_dict=weights)
        )
    if options.method in PEFT_METHODS:
        return replace_files(options.out / "adapter", model.save_pretrained)
    pylora.save_adapter(model, options.out / "adapter")
    return options.out / "adapter"


def saved_bytes(saved: Path) -> int:
    """Returns the size of the weights that `save` wrote."""
    return sum(file.stat().st_size for file in saved.glob("*.safetensors"))


def switch_seconds(model: Any, saved: Path, options: argparse.Namespace) -> float:
    """Returns the median time of a switch from one task to another in this process.

    Two tasks share the base model, and a switch makes the other one active. Full fine-tuning shares
    nothing, so a switch reads the other model's weights from its file.
    """
    switch = _switch_of(model, saved, options)
    seconds = []
    for name in (SECOND, FIRST) * 5:
        start = time.perf_counter()
        switch(name)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _switch_of(model: Any, saved: Path, options: argparse.Namespace) -> Callable[[str], object]:
    if options.method == "full":
        from safetensors.torch import load_file

        # A tied output head is in the file once, under the name of the embedding.
        return lambda name: model.load_state_dict(
            load_file(saved / "model.safetensors"), strict=False
        )
    add_task(model, SECOND, options)
    if options.method in PEFT_METHODS:
        return model.set_adapter
    return lambda name: pylora.set_active_adapters(model, name)
