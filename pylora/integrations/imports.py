"""Runs something when a library is imported, now or later, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Calls `then` at once if the library has been imported, else when it has been."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(name, then))


def forget(name: str) -> None:
    """Does not wait for the import of this library any more."""
    sys.meta_path[:] = [f for f in sys.meta_path if not (isinstance(f, _Watch) and f.name == name)]


class _Watch(MetaPathFinder):
    """Finds no module itself; it adds a call to the loader that the other finders return."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self._then, self._asking = name, then, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the library with the call added; None for every other module."""
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._add_call(spec.loader)
        return spec

    def _add_call(self, loader: object) -> None:
        own = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            own(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then()

        loader.exec_module = exec_module  # type: ignore[attr-defined]
