"""Finds the linear layers whose weight must be left as it is, and says why.

Some weights are no plain parameters. Others are read by the module that holds the layer:
Mamba's mixer multiplies by `self.dt_proj.weight` instead of calling the layer, and T5 casts its
input to `self.wo.weight.dtype`. LoRA on such a layer would have no effect, and NF4 would hand out
packed bytes. Both are found in the source of the module's class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from pylora import checks
from pylora.models.module_tree import Site, has_fast_path, is_4bit
from pylora.nn.conv1d import is_conv1d

# Methods that do not take part in a forward.
_SETTING_UP = {"__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters"}
# What code may ask a weight without reading its values.
_FACTS = {"dtype", "device", "shape", "ndim", "dim", "size", "requires_grad", "is_meta"}


@dataclass(frozen=True)
class Reading:
    """The attributes of a module whose weight its own code reads.

    values   those whose values it reads
    dtypes   those whose dtype it asks for
    """

    values: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()


def _reading(module: nn.Module) -> Reading:
    kind: Any = type(module)
    return reading_of(kind)


@cache
def reading_of(kind: Any) -> Reading:
    """What the methods of a module's class read of the layers in its attributes."""
    values: set[str] = set()
    dtypes: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for method in _methods(base):
            _read(method, values, dtypes)
    return Reading(frozenset(values), frozenset(dtypes))


def _methods(kind: type) -> list[ast.AST]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # a class that was not written in a file
        return []
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef)
    return [
        node
        for node in definition.body
        if isinstance(node, ast.FunctionDef) and node.name not in _SETTING_UP
    ]


def _read(method: ast.AST, values: set[str], dtypes: set[str]) -> None:
    asked: dict[int, str] = {}  # node of a weight -> which fact the code asks it for
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            asked[id(node.value)] = node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "type"):
            asked.update((id(argument), "type") for argument in node.args)
    for node in ast.walk(method):
        attribute = _attribute_with_weight(node)
        if attribute is None:
            continue
        fact = asked.get(id(node))
        if fact is None:
            values.add(attribute)
        elif fact == "dtype":
            dtypes.add(attribute)


def _attribute_with_weight(node: ast.AST) -> str | None:
    """Returns "proj" for the code `self.proj.weight`, and None for other code."""
    if not isinstance(node, ast.Attribute) or node.attr != "weight":
        return None
    layer = node.value
    if not isinstance(layer, ast.Attribute) or not isinstance(layer.value, ast.Name):
        return None
    return layer.attr if layer.value.id == "self" else None


def why_not_lora(site: Site) -> str | None:
    """Why the layer at this site must not get LoRA; None if it may."""
    linear = isinstance(site.module, nn.Linear) or is_conv1d(site.module)
    dense = linear and not is_4bit(site.module)
    reason = checks.why_not_plain(site.module) if dense else None
    if reason is not None:
        return reason
    if site.parent is None or has_fast_path(site.parent):
        return None
    if site.attribute not in _reading(site.parent).values:
        return None
    return f"{type(site.parent).__name__} reads its weight itself instead of calling the layer"


def why_not_nf4(site: Site) -> str | None:
    """Why the layer at this site must keep a dense weight; None if it need not."""
    reason = why_not_lora(site)
    if reason is None and "weight" in site.module._buffers:
        reason = "its weight is a buffer, no parameter"
    if reason is not None or site.parent is None or has_fast_path(site.parent):
        return reason
    if site.attribute not in _reading(site.parent).dtypes:
        return None
    return f"{type(site.parent).__name__} asks for the dtype of its weight"
