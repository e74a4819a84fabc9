"""Fixtures shared by all tests: poisoned buffers, fixed seeds, and the backends of this machine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pylora import dispatch
from pylora.selfcheck import cpu_isa, variants

ROOT = Path(__file__).resolve().parent.parent


def _load_benchmarks() -> None:
    """`benchmarks` without the repository root on sys.path, where kernels/ must not be found."""
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


_load_benchmarks()

VARIANTS = [("reference", "pure PyTorch", None), *variants()]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """torch.empty gives NaN, so that an element no kernel wrote is seen."""
    torch.manual_seed(20240229)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _parameter(variant: tuple[str, str, str | None]) -> Any:
    name, _, isa = variant
    marks = [pytest.mark.gpu] if dispatch.BACKENDS[name].device() == "cuda" else []
    return pytest.param(variant, marks=marks, id=f"{name}-{isa or 'default'}")


@pytest.fixture(params=map(_parameter, VARIANTS))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend, on the CPU each instruction set, that can run here; yields its name."""
    name, _, isa = request.param
    with dispatch.use_backend(name), cpu_isa(isa):
        yield name


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a test on `backend` must be."""
    return dispatch.BACKENDS[backend].device()
