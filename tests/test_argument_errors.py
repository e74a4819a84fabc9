"""A wrong argument raises one error that names it, says what it was and what it must be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylora
from pylora import functional as F
from pylora.nn import LoRALinear, NF4Linear


def lora(scaling: Any = 0.5, **arguments: Any) -> Tensor:
    w = pylora.quantize_nf4(torch.randn(8, 64))
    return F.lora_linear(
        torch.randn(2, 64), w, torch.randn(2, 64), torch.randn(8, 2), scaling, **arguments
    )


def layer(**arguments: Any) -> LoRALinear:
    return LoRALinear(nn.Linear(8, 8), **arguments)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64))


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lora("a"), TypeError, "scaling is 'a'; it must be a number"),
    (lambda: lora(None), TypeError, "scaling is None; it must be a number"),
    (lambda: lora(dropout_p="a"), TypeError, "dropout_p is 'a'; it must be a number"),
    (lambda: lora(dropout_p=0.5, seed=1.5), TypeError, "seed is 1.5; it must be an int"),
    (lambda: lora(dropout_p=0.5, seed="a"), TypeError, "seed is 'a'; it must be an int"),
    (lambda: lora(dropout_p=0.5, seed=2**63), ValueError, "must fit in 64 bits"),
    (lambda: pylora.quantize_nf4(torch.ones(8, 8), 64.0), ValueError, "blocksize is 64.0; it must"),
    (lambda: pylora.quantize_nf4(torch.ones(8, 8), "64"), ValueError, "blocksize is '64'; it must"),
    (
        lambda: pylora.dequantize_nf4(pylora.quantize_nf4(torch.ones(8)), torch.float8_e4m3fn),
        TypeError,
        "dtype is torch.float8_e4m3fn; it must be float16",
    ),
    (lambda: NF4Linear(True, 64), ValueError, "in_features is True; it must be an integer >= 0"),
    (lambda: layer(r=True), ValueError, "r is True; it must be an integer >= 1"),
    (lambda: layer(lora_alpha="x"), TypeError, "lora_alpha is 'x'; it must be a number"),
    (lambda: layer(lora_alpha=None), TypeError, "lora_alpha is None; it must be a number"),
    (lambda: layer(lora_alpha=float("nan")), ValueError, "lora_alpha is nan; it must be finite"),
    (lambda: layer(lora_dropout="x"), TypeError, "lora_dropout is 'x'; it must be a number"),
    (lambda: layer(dtype="float32"), TypeError, "dtype is 'float32'; it must be float16"),
    (lambda: pylora.add_lora("x"), TypeError, "model is 'x'; it must be an nn.Module"),
    (lambda: pylora.add_lora(model(), target_modules=3), TypeError, "target_modules is 3; it must"),
    (lambda: pylora.add_lora(model(), target_modules="("), ValueError, "a regular expression"),
    (lambda: pylora.add_lora(model(), modules_to_save=3), TypeError, "modules_to_save is 3; it"),
    (lambda: pylora.quantize_model(3), TypeError, "model is 3; it must be an nn.Module"),
    (lambda: pylora.quantize_model(model(), skip_modules=3), TypeError, "skip_modules is 3; it"),
    (lambda: pylora.merge(None), TypeError, "model is None; it must be an nn.Module"),
    (
        lambda: pylora.explain("lora_linear"),
        TypeError,
        r"lora_linear\(\): missing .* argument: 'x'",
    ),
]


@pytest.mark.parametrize("call, error, message", CASES, ids=[message for _, _, message in CASES])
def test_error_names_the_argument(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("scaling", [1, torch.tensor(2.0), True], ids=repr)
def test_scaling_may_be_whatever_float_accepts(scaling: Any) -> None:
    torch.manual_seed(0)
    expected = lora(float(scaling))
    torch.manual_seed(0)
    assert torch.equal(lora(scaling), expected)


def test_command_line_refuses_an_unknown_backend_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYLORA_BACKEND", "foo")
    command = [sys.executable, "-m", "pylora", "info"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "PYLORA_BACKEND is 'foo'; it must be one of" in result.stderr
    assert "Traceback" not in result.stderr
