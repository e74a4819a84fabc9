"""Bottleneck adapters: their configurations, how they are composed, and where they sit in a model.

The functions of whole models that use these are in `pylora.models`.
"""

from pylora.adapters.composition import Average, BatchSplit, Composition, Fuse, Parallel, Stack
from pylora.adapters.configs import AdapterConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig

__all__ = [
    "AdapterConfig",
    "Average",
    "BatchSplit",
    "Composition",
    "Fuse",
    "HoulsbyConfig",
    "Parallel",
    "ParallelConfig",
    "PfeifferConfig",
    "Stack",
]
