"""Finds the modules that a specification of targets names, by PEFT's rules, and writes one."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from pylora.models.module_tree import Site, is_below, is_bitsandbytes_4bit, sites
from pylora.models.weight_readers import why_not_lora
from pylora.models.wrappers import inside
from pylora.nn import LoRALinear, NF4Linear
from pylora.nn.conv1d import is_conv1d, is_plain_linear

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
# What transformers calls the heads of its models for a task.
_TASK_HEADS = ("classifier", "classification_head", "qa_outputs", "score")
_Value = TypeVar("_Value")


def named_by(name: str, entries: Collection[str]) -> bool:
    """True if an entry is the whole dotted name or its last components."""
    return name in entries or any(name.endswith(f".{entry}") for entry in entries)


def can_carry_lora(module: nn.Module) -> bool:
    """True for the layers that LoRALinear can wrap.

    Other subclasses of nn.Linear are not among them, because they may compute something else.
    """
    plain = is_plain_linear(module) or is_conv1d(module)
    return plain or isinstance(module, NF4Linear) or is_bitsandbytes_4bit(module)


def other_linear_classes(places: Iterable[Site]) -> str:
    """Names the classes of linear layers that cannot carry LoRA, for the end of an error."""
    names = {
        type(site.module).__name__
        for site in places
        if "Linear" in type(site.module).__name__
        and hasattr(site.module, "weight")
        and not isinstance(site.module, LoRALinear)
        and not can_carry_lora(site.module)
    }
    if not names:
        return ""
    return (
        ". Linear layers of other classes are not taken, because they may compute something else: "
        f"{', '.join(sorted(names))}"
    )


@dataclass(frozen=True)
class Targets:
    """The modules to wrap, in the terms of PEFT's configuration.

    modules              "all-linear" for every linear layer but the output head; another string is
                         a regular expression for the whole name; a collection has names, or their
                         last components
    excluded             what to leave out, as a regular expression or names
    layers               the numbers of the only layers to wrap; it holds for names with a number
    layers_pattern       the names of the module lists that these numbers count; any list if empty
    fully_trained        the names of modules that are trained in full; nothing inside them is
                         wrapped
    """

    modules: str | Collection[str]
    excluded: str | Collection[str] = ()
    layers: Collection[int] | None = None
    layers_pattern: Sequence[str] = ()
    fully_trained: Collection[str] = ()

    def find(self, model: nn.Module) -> list[Site]:
        """The sites that are meant, in the model's order, even if they cannot carry LoRA."""
        candidates = [s for s in sites(model) if not is_below(s.name, self.fully_trained)]
        if isinstance(self.modules, str) and self.modules.lower() == ALL_LINEAR:
            head = output_head(model)
            linear = (s for s in candidates if _is_linear(s.module) and s.module is not head)
            return [s for s in linear if not self._is_excluded(s.name) and _takes_lora(s)]
        return [s for s in candidates if self._is_meant(s.name) and not self._is_excluded(s.name)]

    def _is_excluded(self, name: str) -> bool:
        if isinstance(self.excluded, str):
            return re.fullmatch(self.excluded, name) is not None
        return named_by(name, self.excluded)

    def _is_meant(self, name: str) -> bool:
        if isinstance(self.modules, str):
            return re.fullmatch(self.modules, name) is not None
        if name in self.modules:
            return True
        return named_by(name, self.modules) and self._is_in_layers(name)

    def _is_in_layers(self, name: str) -> bool:
        if not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern]
        # The first number in a name is that of the layer; a later number counts experts.
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            match = re.match(pattern, name)
            if match is not None:
                return int(match.group(1)) in self.layers
        return False


def _takes_lora(site: Site) -> bool:
    reason = why_not_lora(site)
    if reason is not None:
        logger.warning("%s gets no LoRA: %s", site.name, reason)
    return reason is None


def _is_linear(module: nn.Module) -> bool:
    return can_carry_lora(module) or isinstance(module, LoRALinear)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, if a model of transformers says which one it is."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        head = get()
    except NotImplementedError:
        return None
    return inside(head) if isinstance(head, nn.Module) else None


def task_heads(model: nn.Module) -> list[str]:
    """The names of the modules that a model for a task, such as classification, adds to its base.

    They are drawn anew when a pretrained model is loaded for the task, so that they must be trained
    in full. A model that gives logits of tokens has none: its head belongs to the pretrained model.
    """
    if output_head(model) is not None:
        return []
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return [
        name
        for name, child in model.named_children()
        if next(child.parameters(), None) is not None
        and (name in _TASK_HEADS or (base is not None and child is not base))
    ]


def describe(
    targets: Iterable[str], fully_trained: Collection[str], model: nn.Module
) -> str | list[str]:
    """The shortest specification that PEFT resolves to exactly the modules `targets`.

    It has their last components if these are unambiguous, else their names, else it is a regular
    expression.
    """
    wanted = set(targets)
    for entries in ({name.rsplit(".", 1)[-1] for name in wanted}, wanted):
        if _names(Targets(entries, fully_trained=fully_trained), model) == wanted:
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _names(targets: Targets, model: nn.Module) -> set[str]:
    return {site.name for site in targets.find(model)}


def pattern_value(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """The value of the first key that matches the end of `name`, as in PEFT's rank_pattern."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def not_found(what: str, wanted: object, names: Iterable[str], also: str = "") -> ValueError:
    """The error for a specification that no module matches; it lists some names that exist.

    also    a sentence for the end
    """
    endings = list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in names))
    if wanted in endings and isinstance(wanted, str) and what == "target_modules":
        return ValueError(
            f"{what} is the string {wanted!r}, which no module of the model matches: a string is a "
            f"regular expression for whole names; last components must be in a list: [{wanted!r}]"
        )
    return ValueError(
        f"{what} is {wanted!r}, which no module of the model matches; "
        f"it must name modules that exist, such as "
        f"{', '.join(endings[:8]) or '(the model has none)'}{also}"
    )
