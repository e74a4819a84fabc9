"""The environment variables that steer pylora, read once; `pylora.refresh()` reads them again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

BACKEND = "PYLORA_BACKEND"
HOPPER = "PYLORA_HOPPER"
AUTOTUNE = "PYLORA_AUTOTUNE"
CACHE = "PYLORA_CACHE"

_forget: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Settings:
    """The values of the environment variables.

    backend     PYLORA_BACKEND: the name of a backend, or "" if none is asked for
    hopper      PYLORA_HOPPER: false ("0") turns the hopper kernel off
    autotune    PYLORA_AUTOTUNE: true lets Triton's tile plans be measured
    """

    backend: str
    hopper: bool
    autotune: bool


@lru_cache(maxsize=1)
def current() -> Settings:
    """The settings as they were when the variables were last read."""
    return Settings(
        backend=os.environ.get(BACKEND, ""),
        hopper=os.environ.get(HOPPER, "1") != "0",
        autotune=os.environ.get(AUTOTUNE, "0") not in ("", "0"),
    )


def cache_folder() -> Path:
    """The folder for files that pylora keeps for a user: PYLORA_CACHE if it is set, otherwise the
    folder "pylora" in XDG_CACHE_HOME or ~/.cache. It may not exist yet.
    """
    chosen = os.environ.get(CACHE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pylora"


def forgotten_on_refresh(forget: Callable[[], None]) -> None:
    """Registers a function that `refresh` calls to drop what was derived from the settings."""
    _forget.append(forget)


def refresh() -> None:
    """Reads the environment variables again; call it after changing one of them."""
    current.cache_clear()
    for forget in _forget:
        forget()
