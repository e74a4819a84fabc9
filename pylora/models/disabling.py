"""`disable_adapter` runs a model without its LoRA layers for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pylora.models.module_tree import (
    fully_trained_modules,
    lora_layers,
    refuse_peft_model,
)
from pylora.models.wrappers import unwrapped


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block every LoRALinear of the model computes what its base layer computes.

    with pylora.disable_adapter(model):
        reference = model(tokens).logits

    Blocks may be nested, and the layers come back after an exception too. A forward that is to be
    differentiated must have its backward inside the block as well if it uses gradient
    checkpointing, which runs the forward again. Raises ValueError, before anything changes, if the
    model has no LoRA, if a layer is merged, or if modules were made trainable in full by
    `modules_to_save`: their weights from before training are not kept.
    """
    root = unwrapped(model)
    refuse_peft_model(root)
    layers = lora_layers(root)
    if not layers:
        raise ValueError("model has no LoRALinear; pylora.add_lora must have been called on it")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; pylora.unmerge must be called first")
    for name in fully_trained_modules(root):
        raise ValueError(
            f"{name} is trained in full, so its weights from before training are not kept; "
            "the model must have no modules_to_save"
        )
    before = [(layer, layer.lora_enabled) for layer in layers.values()]
    try:
        for layer, _ in before:
            layer.lora_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.lora_enabled = enabled
