"""What pylora has in the place of PEFT's functions and methods, for people who look for those."""

from __future__ import annotations

from typing import Any

_INSTEAD = {
    "LoraConfig": "its fields are arguments of pylora.add_lora",
    "add_weighted_adapter": (
        "pylora combines no adapters: write each by pylora.save_adapter(model, path, "
        "adapter_name=name), load them all into one peft.PeftModel, combine them there by "
        "add_weighted_adapter and save_pretrained, and read the result by pylora.load_adapter"
    ),
    "disable_adapters": "use `with pylora.disable_adapter(model):`",
    "get_peft_model": (
        "use pylora.add_lora(model, ...), or peft.get_peft_model and then pylora.accelerate(model)"
    ),
    "get_peft_model_state_dict": "use pylora.save_adapter(model, path)",
    "list_adapters": "use pylora.adapter_names(model)",
    "merge_adapter": "use pylora.merge(model)",
    "merge_and_unload": "use pylora.merge(model, keep_base=False)",
    "set_adapter": "use pylora.set_active_adapters(model, name)",
    "set_peft_model_state_dict": "use pylora.load_adapter(model, path)",
    "unmerge_adapter": "use pylora.unmerge(model)",
}


def instead_of(name: str) -> str | None:
    """What to do instead of calling PEFT's function or method of this name; None for others."""
    return _INSTEAD.get(name)


def refuse_several(adapter: Any) -> None:
    """Raises TypeError unless `adapter` is the name of one adapter."""
    if isinstance(adapter, str):
        return
    raise TypeError(
        f"adapter_name is {adapter!r}; it must be the name of one adapter. Several at once need a "
        "peft.PeftModel: its base_model.set_adapter takes a list, and pylora.accelerate makes it "
        "compute through pylora"
    )
