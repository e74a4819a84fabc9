"""The modules of a model by name, as PEFT sees them: what pylora wrapped counts as one module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pylora.nn import LoRALinear, NF4Linear

# Where a module keeps the hooks registered on it.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_FULLY_TRAINED = "_pylora_fully_trained"


@dataclass(frozen=True)
class Site:
    """A module and where it sits: `parent.<attribute>` is `module`, `name` its dotted path in the
    model.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None = None
    attribute: str = ""

    def replace(self, new: nn.Module) -> None:
        """Puts `new` in the module's place, in the same mode and with the hooks that were on it."""
        assert self.parent is not None
        for hooks in _HOOKS:
            getattr(new, hooks).update(getattr(self.module, hooks))
            getattr(self.module, hooks).clear()
        new.training = self.module.training
        setattr(self.parent, self.attribute, new)
        if isinstance(self.parent, nn.TransformerEncoderLayer):
            # In eval mode it has a fast path that reads the weights instead of calling the layers.
            # Torch takes the path only if this is 1 or 2, and reads it for nothing else.
            self.parent.activation_relu_or_gelu = 0


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers, whose names are the plain
    ones.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; it must be an nn.Module")
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def sites(model: nn.Module) -> Iterator[Site]:
    """Every module but the model itself, parents first; a module held at two places comes twice.

    Nothing inside a LoRALinear or an NF4Linear is listed.
    """
    if isinstance(model, LoRALinear):
        return
    yield from _below(model, "")


def _below(parent: nn.Module, prefix: str) -> Iterator[Site]:
    for attribute, module in list(parent._modules.items()):
        if module is None:
            continue
        if attribute == "_orig_mod":  # torch.compile's wrapper is no part of a name
            yield from _below(module, prefix)
            continue
        yield Site(prefix + attribute, module, parent, attribute)
        if not isinstance(module, (LoRALinear, NF4Linear)):
            yield from _below(module, f"{prefix}{attribute}.")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of a model by name; each once, "" for the model itself."""
    found = {"": model} if isinstance(model, LoRALinear) else {}
    seen = set()
    for site in sites(model):
        if isinstance(site.module, LoRALinear) and id(site.module) not in seen:
            seen.add(id(site.module))
            found[site.name] = site.module
    return found


def mark_fully_trained(module: nn.Module) -> None:
    """Remembers that `module` is trained and saved in full, beside the LoRA layers."""
    setattr(module, _FULLY_TRAINED, True)


def fully_trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `mark_fully_trained` marked, by name."""
    return {s.name: s.module for s in sites(model) if getattr(s.module, _FULLY_TRAINED, False)}


def is_below(name: str, ancestors: Iterable[str]) -> bool:
    """True where `name` is, or lies inside, one of the modules named."""
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def holders(model: nn.Module) -> dict[int, list[str]]:
    """For the id of every parameter: the names of the modules that hold it themselves."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))
    return found


def is_bitsandbytes_4bit(module: nn.Module) -> bool:
    """True for a bitsandbytes Linear4bit, of whatever quant_type."""
    # Known by its parameter: bitsandbytes need not be installed, and PEFT subclasses are not meant.
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


def is_4bit(module: nn.Module) -> bool:
    """True for a linear layer that holds packed codes, ours or bitsandbytes'."""
    return isinstance(module, NF4Linear) or is_bitsandbytes_4bit(module)


def take_off_quantized_marks(model: nn.Module, has_lora: bool) -> None:
    """Takes from a model that transformers loaded in 4 bits the marks that no longer hold.

    With `is_quantized` its Trainer refuses a model without PEFT's adapters, so it goes where there
    is LoRA; with the others `.half()` and `.to(dtype)` refuse, so all go where no bitsandbytes
    layer is left. What `save_pretrained` goes by stays.
    """
    has_bitsandbytes = any(is_bitsandbytes_4bit(module) for module in model.modules())
    for module in model.modules():
        marks = vars(module)
        if not marks.get("is_loaded_in_4bit"):
            continue
        if has_lora or not has_bitsandbytes:
            marks["is_quantized"] = False
        if not has_bitsandbytes:
            marks["is_loaded_in_4bit"] = False
            marks.pop("quantization_method", None)


def refuse_offloaded(site: Site) -> None:
    """Raises ValueError where accelerate keeps the module's weights off the device."""
    if getattr(getattr(site.module, "_hf_hook", None), "offload", False):
        raise ValueError(
            f"{site.name} is offloaded by accelerate; its weights must be on a device: "
            "load the model without offloading"
        )


def refuse_peft_model(model: nn.Module) -> None:
    """Raises ValueError for a model that PEFT has wrapped already."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model is a {type(model).__name__} with PEFT adapters; it must be the model without "
            "them: save them with save_pretrained, then use pylora.load_adapter on the plain model"
        )
