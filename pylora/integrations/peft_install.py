"""`install` makes every method of PEFT for linear layers take `pylora.nn.NF4Linear`.

It exchanges a few methods of PEFT's classes. While PEFT adds adapters, each NF4Linear of the model
is a `PeftNF4Linear`, which PEFT takes for an nn.Linear; those that got no adapter are given back at
the end, and the others when PEFT unloads the model. Merges go through `peft_base_layer`. Models
without an NF4Linear are treated as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import nn

from pylora.integrations import imports, peft_base_layer
from pylora.integrations.peft_base_layer import PeftNF4Linear, replaced_methods
from pylora.models.merging import MergeReport
from pylora.nn import NF4Linear

logger = logging.getLogger(__name__)

_REPLACED = "_pylora_replaces"
# Initializations that need a function of PEFT to be called on the dense model.
_ANALYSES = ("corda", "lora_ga")
_by_itself = True  # whether the first NF4Linear installs it


def install() -> None:
    """Makes every method of PEFT that takes a linear layer take `pylora.nn.NF4Linear`.

    The first NF4Linear of the process calls it, at once if PEFT has been imported or else when PEFT
    is imported. To call it again changes nothing; `uninstall` undoes it. Raises ImportError if PEFT
    is not installed or has not the methods that are exchanged.
    """
    from peft.tuners import tuners_utils

    if is_installed():
        return
    tuner: Any = tuners_utils.BaseTuner
    needed = ("inject_adapter", "merge_adapter", "_unload_and_optionally_merge")
    missing = [name for name in needed if not hasattr(tuner, name)]
    if missing:
        raise ImportError(
            f"peft.tuners.tuners_utils.BaseTuner has no {missing[0]}; this version of PEFT cannot "
            "take NF4 layers"
        )
    for cls in _with_subclasses(tuner):
        _replace(cls, "_unload_and_optionally_merge", _unloading)
    _replace(tuner, "__init__", _taking)
    _replace(tuner, "inject_adapter", _injecting)
    _replace(tuner, "merge_adapter", _merging_all)
    for cls in _with_subclasses(tuners_utils.BaseTunerLayer):
        _replace_merges(cls)


def uninstall() -> None:
    """Gives PEFT its own methods back.

    A model that has adapters over NF4 layers still computes, but PEFT cannot merge them or add
    others: RuntimeError says to call `install` again. Nothing else installs it after that.
    """
    global _by_itself
    _by_itself = False
    imports.forget("peft")
    for cls, name, own in reversed(replaced_methods):
        setattr(cls, name, own)
    replaced_methods.clear()


def is_installed() -> bool:
    """True between `install` and `uninstall`."""
    return bool(replaced_methods)


def install_with_peft() -> None:
    """Calls `install` when PEFT is imported, or at once if it has been; not after `uninstall`."""
    if _by_itself:
        imports.when_imported("peft", _try_to_install)


def _try_to_install() -> None:
    try:
        install()
    except ImportError as error:
        logger.warning("PEFT will refuse NF4 layers of pylora: %s", error)


def merge_report(model: nn.Module) -> MergeReport:
    """What rounding to NF4 lost in the layers that PEFT has merged adapters into.

    Raises ValueError if there is none.
    """
    layers = tuple(
        replace(module.before_merge.loss, name=name.removesuffix(".base_layer"))
        for name, module in model.named_modules()
        if isinstance(module, PeftNF4Linear) and module.before_merge is not None
    )
    if not layers:
        raise ValueError("model has no NF4 layer into which PEFT has merged an adapter")
    return MergeReport(layers)


def _with_subclasses(cls: Any) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _replace(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Replaces a method that the class itself defines by `around(own, instance, ...)`."""
    own = vars(cls).get(name)
    if own is None or hasattr(own, _REPLACED):
        return

    @wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(own, self, *args, **kwargs)

    setattr(method, _REPLACED, True)
    replaced_methods.append((cls, name, own))
    setattr(cls, name, method)


def _replace_merges(cls: type) -> None:
    _replace(cls, "merge", _merging)
    _replace(cls, "unmerge", _unmerging)


def _base_of(peft_layer: Any) -> PeftNF4Linear | None:
    base = peft_layer.get_base_layer()
    return base if isinstance(base, PeftNF4Linear) else None


def _taking(own: Any, tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """`BaseTuner.__init__`: it looks at the layers before it adds adapters."""
    _take(model)
    try:
        own(tuner, model, *args, **kwargs)
    finally:
        _give_back(model)


def _injecting(
    own: Any, tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    _refuse(model, tuner.peft_config[adapter_name])
    _take(model)
    create = tuner._create_and_replace

    def create_and_replace(config: Any, name: str, target: Any, *rest: Any, **options: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, PeftNF4Linear):
            return create(config, name, target, *rest, **options)
        with peft_base_layer.writable(base):
            return create(config, name, target, *rest, **options)

    nested = "_create_and_replace" in vars(tuner)
    if not nested:
        tuner._create_and_replace = create_and_replace
    try:
        return own(tuner, model, adapter_name, *args, **kwargs)
    finally:
        if not nested:
            del tuner._create_and_replace
        _give_back(model)


def _merging_all(own: Any, tuner: Any, *args: Any, **kwargs: Any) -> None:
    own(tuner, *args, **kwargs)
    _log_loss(tuner.model)


def _unloading(own: Any, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    model = tuner.model
    result = own(tuner, *args, **kwargs)
    _log_loss(model)
    _give_back(model)
    return result


def _merging(
    own: Any, layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    base = _base_of(layer)
    if base is None or base.is_written:  # by the merge that calls this one
        return own(layer, safe_merge=safe_merge, adapter_names=adapter_names)
    names = check_adapters_to_merge(layer, adapter_names)
    if not names:
        return None

    def merge(merged_before: list[str]) -> None:
        own(layer, safe_merge=safe_merge, adapter_names=[*merged_before, *names])

    return peft_base_layer.merge(base, layer, merge)


def _unmerging(own: Any, layer: Any) -> None:
    base = _base_of(layer)
    if base is None or base.is_written:
        return own(layer)
    return peft_base_layer.unmerge(base, layer, lambda: own(layer))


def _log_loss(model: nn.Module) -> None:
    try:
        report = merge_report(model)
    except ValueError:
        return
    for layer in report.layers:
        logger.info("merged %s", layer)
    logger.warning("merged adapters into NF4: %s", report.total)


def _take(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is NF4Linear:
            peft_base_layer.take(module)


def _give_back(model: nn.Module) -> None:
    """Gives back the layers of the model that are no base layer of PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    bases = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            bases.add(id(module.get_base_layer()))
            for cls in type(module).__mro__:
                if issubclass(cls, BaseTunerLayer):  # a class that came after `install`
                    _replace_merges(cls)
    for module in model.modules():
        if type(module) is PeftNF4Linear and id(module) not in bases:
            peft_base_layer.give_back(module)


def _refuse(model: nn.Module, config: Any) -> None:
    """Raises ValueError if the configuration asks for what an NF4 layer cannot do."""
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, NF4Linear)
    }
    init = getattr(config, "init_lora_weights", None)
    if init in _ANALYSES and any(_is_target(config, name) for name in layers):
        raise ValueError(
            f"init_lora_weights is {init!r}, for which PEFT analyses dense layers beforehand and "
            "finds no NF4 layers; use 'eva', 'pissa' or the default over NF4"
        )
    for entry in getattr(config, "target_parameters", None) or ():
        for name in layers:
            if f".{name}.weight".endswith(f".{entry}"):
                raise ValueError(
                    f"target_parameters has {entry!r}, which is the packed weight of the NF4 layer "
                    f"{name}; name the layer in target_modules instead"
                )
    for entry in getattr(config, "modules_to_save", None) or ():
        for name in layers:
            if f".{entry}." in f".{name}.":
                raise ValueError(
                    f"modules_to_save has {entry!r}, which would train the NF4 layer {name}; keep "
                    "it dense: give its name in skip_modules when the model is quantized"
                )


def _is_target(config: Any, name: str) -> bool:
    """True if the configuration puts an adapter on the layer with this name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if str(config.target_modules).lower() == "all-linear":
        return True
    return bool(check_target_module_exists(config, name))
