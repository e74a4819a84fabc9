"""The compiled extension `pylora._C`: loaded once; a package built without it runs all the same."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType


@lru_cache(maxsize=1)
def load() -> tuple[ModuleType | None, str | None]:
    """(the module, None), or (None, why it could not be imported), with one warning."""
    try:
        from pylora import _C
    except ImportError as error:
        reason = f"the compiled extension pylora._C could not be imported: {error}"
        warnings.warn(f"{reason}; pylora runs on its PyTorch reference", stacklevel=2)
        return None, reason
    return _C, None
