"""The modules of a model by name, as PEFT names them; a layer that pylora wrapped is one module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from pylora.adapters.slot import SLOTS
from pylora.models.wrappers import classes_of, inner_attribute, inside, plain_name
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.changes import note_change
from pylora.nn.inactive import HOLDER

# The attributes in which a module keeps its hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_ADDED_BIAS = "_pylora_added_bias"


@dataclass(frozen=True)
class Site:
    """A module and its place in the model.

    name         its dotted path in the model, without wrappers
    module       the module, which is `parent.<attribute>` or inside a wrapper there
    parent       the module that holds it; None for the model itself
    attribute    its name in `parent`
    """

    name: str
    module: nn.Module
    parent: nn.Module | None = None
    attribute: str = ""

    def replace(self, new: nn.Module) -> None:
        """Puts `new` in the module's place, in the same mode and with the same hooks."""
        assert self.parent is not None
        for hooks in _HOOKS:
            getattr(new, hooks).update(getattr(self.module, hooks))
            getattr(self.module, hooks).clear()
        new.training = self.module.training
        holder, attribute = self._holder()
        setattr(holder, attribute, new)
        note_change()
        if has_fast_path(self.parent):
            # Torch takes the path only if this is 1 or 2, and reads it for nothing else.
            self.parent.activation_relu_or_gelu = 0

    def _holder(self) -> tuple[nn.Module, str]:
        """The module that holds this one, which may be a wrapper, and its name there."""
        assert self.parent is not None
        holder, attribute = self.parent, self.attribute
        while (held := holder._modules[attribute]) is not self.module:
            inner = None if held is None else inner_attribute(held)
            assert held is not None and inner is not None
            holder, attribute = held, inner
        return holder, attribute

    def check_replaceable(self) -> None:
        """Raises ValueError if another module in this place would not be called, or has no weight.

        torch.compile keeps the module that it was given, and accelerate loads the weights of
        modules that it offloads only while they run.
        """
        if getattr(getattr(self.module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"{self.name} is offloaded by accelerate; its weights must be on a device: "
                "load the model without offloading"
            )
        if self.parent is not None and "OptimizedModule" in classes_of(self._holder()[0]):
            raise ValueError(
                f"{self.name} is compiled by itself, and the compiled code would go on without "
                "what replaces it: call torch.compile after pylora.quantize_model and "
                "pylora.add_lora"
            )


def has_fast_path(parent: nn.Module | None) -> TypeGuard[nn.TransformerEncoderLayer]:
    """True for a module of torch's whose fast path reads weights and can be kept off.

    torch takes the path in eval mode, instead of calling the layers.
    """
    return isinstance(parent, nn.TransformerEncoderLayer)


def sites(model: nn.Module) -> Iterator[Site]:
    """Yields every module but the model itself, parents first.

    A module with two places comes twice. Wrappers, what holds inactive or bottleneck adapters, and
    the modules inside a LoRALinear or an NF4Linear are left out.
    """
    model = inside(model)
    if isinstance(model, LoRALinear):
        return
    yield from _below(model, "")


def _below(parent: nn.Module, prefix: str) -> Iterator[Site]:
    for attribute, child in list(parent._modules.items()):
        if child is None or attribute in (HOLDER, SLOTS):
            continue
        module = inside(child)
        yield Site(prefix + attribute, module, parent, attribute)
        if not isinstance(module, (LoRALinear, NF4Linear)):
            yield from _below(module, f"{prefix}{attribute}.")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of a model by name, each once; the name of the model itself is ""."""
    layers = {"": model} if isinstance(model, LoRALinear) else {}
    seen = set()
    for site in sites(model):
        if isinstance(site.module, LoRALinear) and id(site.module) not in seen:
            seen.add(id(site.module))
            layers[site.name] = site.module
    return layers


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoRALinear]:
    """The LoRALinears that have an adapter, by name; by default those that have the active one."""
    return {
        name: layer
        for name, layer in lora_layers(model).items()
        if (layer.active_adapter if adapter is None else adapter in layer.adapter_names)
    }


def mark_added_bias(module: nn.Module) -> None:
    """Marks a layer whose bias was made by a merge."""
    setattr(module, _ADDED_BIAS, True)


def merge_added_bias(module: nn.Module) -> bool:
    """True for a layer, merged or unloaded, that had no bias before it was merged."""
    if isinstance(module, LoRALinear):
        return module.merge_added_bias
    return getattr(module, _ADDED_BIAS, False)


def is_below(name: str, ancestors: Iterable[str]) -> bool:
    """True if `name` is one of the ancestors or the name of a module inside one of them."""
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def holders(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter directly, by the parameter's id."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(plain_name(model, name))
    return names


def is_bitsandbytes_4bit(module: nn.Module) -> bool:
    """True for a bitsandbytes Linear4bit, of whatever quant_type."""
    # The parameter's class identifies it, so bitsandbytes need not be installed.
    if isinstance(module, NF4Linear) or not isinstance(module, nn.Linear):
        return False
    return type(module.weight).__name__ == "Params4bit"


def is_4bit(module: nn.Module) -> bool:
    """True for a linear layer that holds 4-bit codes: an NF4Linear or one of bitsandbytes."""
    return isinstance(module, NF4Linear) or is_bitsandbytes_4bit(module)


def refuse_peft_model(model: nn.Module) -> None:
    """Raises ValueError for a model that PEFT has wrapped already."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model is a {type(model).__name__} with PEFT adapters; it must be the model without "
            "them: save them with save_pretrained, then use pylora.load_adapter on the plain model"
        )
