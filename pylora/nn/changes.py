"""A mark of the last change of layers: what was found in a model before it may be out of date.

Making, copying and loading a LoRALinear sets a new mark, and so does every function of pylora that
replaces layers or gives them adapters.
"""

from __future__ import annotations

_last_change = object()


def note_change() -> None:
    """Sets a new mark; the caller is about to change layers of a model, or has done so."""
    global _last_change
    _last_change = object()


def last_change() -> object:
    """The mark: an object that is another one after each `note_change`."""
    return _last_change
