"""The types of the compiled extension; csrc/bindings.cpp has its ops, `torch.ops.pylora_C.*`."""

from typing import Any

def build_info() -> dict[str, Any]:
    """The version, the compiler, CUDA and the sources that the extension was built with.

    "activations" has the names of the activations in the order of their numbers; "limits" says what
    the kernels of "cpu" and "cuda" cannot do at all.
    """

def cpu_features() -> list[str]: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
