"""Looks through the wrappers that libraries put around a model or around modules in it.

A wrapper adds a component to the names of what it holds. PEFT does not find such names in the plain
model and then loads nothing, so names in pylora are always those without wrappers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

# The class of a wrapper -> the attribute in which it holds the wrapped module. The classes are
# known by name, because most of them belong to packages that are optional.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",  # torch.optim.swa_utils
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # checkpoint_wrapper and offload_wrapper
    "DeepSpeedEngine": "module",
    "_FabricModule": "_forward_module",  # Lightning Fabric
}


def classes_of(module: object) -> set[str]:
    """The names of the module's class and of the classes that it inherits from."""
    return {kind.__name__ for kind in type(module).__mro__}


def inner_attribute(module: nn.Module) -> str | None:
    """The attribute that holds the wrapped module if `module` is a wrapper, else None."""
    for kind in type(module).__mro__:
        attribute = _WRAPPERS.get(kind.__name__)
        if attribute is not None and module._modules.get(attribute) is not None:
            return attribute
    return None


def wrappers_around(module: nn.Module) -> Iterator[nn.Module]:
    """The module and, if it is a wrapper, what is in it: further wrappers, and at last the model.

    The first one comes first.
    """
    inner: nn.Module | None = module
    while inner is not None:
        yield inner
        attribute = inner_attribute(inner)
        inner = None if attribute is None else inner._modules[attribute]


def inside(module: nn.Module) -> nn.Module:
    """The module itself or, if it is a wrapper, the module inside it and all further wrappers."""
    *_, module = wrappers_around(module)
    return module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it.

    Raises TypeError if `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; it must be an nn.Module")
    while True:
        model = inside(model)
        if not getattr(type(model), "wraps_model_of_pylora", False):  # see integrations/peft.py
            return model
        model = model.get_base_model()  # type: ignore[operator]


def plain_name(model: nn.Module, name: str) -> str:
    """The dotted name of a module, parameter or buffer of `model`, without wrappers in it."""
    parts = []
    module: nn.Module | None = model
    for part in name.split("."):
        while module is not None and (attribute := inner_attribute(module)) is not None:
            module = module._modules[attribute]
            if part == attribute:
                break
        else:
            parts.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict under names without wrappers."""
    return {plain_name(module, key): value for key, value in module.state_dict().items()}


def refuse_unknown_wrappers(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError if a module that holds one of `names` looks like a wrapper.

    names    names of modules of `model`, as they would be written to a file
    """
    checked: set[int] = set()
    for name in names:
        package = None  # that of the nearest module above, but for torch's containers
        for path, module, attribute in _way_to(model, name):
            if id(module) not in checked:
                checked.add(id(module))
                reason = _why_wrapper(module, attribute, package, is_model=module is model)
                if reason is not None:
                    place = f"{path} in the model" if path else "model"
                    raise ValueError(
                        f"{place} is a {type(module).__name__}, which {reason}, so it looks like a "
                        f"wrapper that pylora does not know, and PEFT would not find the name "
                        f"{name!r} in the model without it: save the model without the wrapper"
                        + ("" if path else f", as pylora.save_adapter(model.{attribute}, path)")
                    )
            package = _package(module) or package


def _way_to(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Each module on the way to `name`, with its path and the attribute that the way takes next."""
    module, path = model, ""
    for part in name.split("."):
        yield path, module, part
        child = module._modules[part]
        assert child is not None
        module, path = inside(child), f"{path}.{part}".lstrip(".")


def _why_wrapper(
    module: nn.Module, attribute: str, package: str | None, is_model: bool
) -> str | None:
    """What makes a module look like a wrapper around its child `attribute`; None if nothing does.

    package    that of the module above
    """
    child = module._modules[attribute]
    assert child is not None
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return None
    if any(True for _ in module.parameters(recurse=False)):
        return None
    if any(
        other is not None and other is not child and next(other.parameters(), None) is not None
        for other in module._modules.values()
    ):
        return None
    if attribute.startswith("_") or (is_model and attribute == "module"):
        return f"holds nothing but {attribute!r}"
    if _forwards_attributes(module, child):
        return f"gives the attributes of {attribute!r} as its own"
    if hasattr(child, "save_pretrained") and not hasattr(module, "save_pretrained"):
        return f"holds nothing but {attribute!r}, which is a whole {type(child).__name__}"
    own = _package(module)
    if own is not None and package is not None and package == _package(child) != own:
        return f"stands between two modules of {package}"
    return None


def _forwards_attributes(module: nn.Module, child: nn.Module) -> bool:
    if type(module).__getattr__ is nn.Module.__getattr__:
        return False
    own = {**module._parameters, **module._buffers, **module._modules}
    return any(
        value is not None and name not in own and getattr(module, name, None) is value
        for held in (child._modules, child._parameters)
        for name, value in held.items()
    )


def _package(module: nn.Module) -> str | None:
    """The package of the module's class; None for the modules of torch and pylora."""
    # fully_shard puts a class of torch before the class of the module.
    packages = (kind.__module__.partition(".")[0] for kind in type(module).__mro__)
    return next((p for p in packages if p not in ("torch", "pylora", "builtins")), None)
