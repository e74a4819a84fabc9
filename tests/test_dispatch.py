"""A backend is chosen by name or by the environment, and the choice is explained."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib import util
from typing import Any

import pytest
import torch

import pylora
import pylora.functional as F
from pylora import dispatch
from pylora.backends import extension

EXPLAIN_NF4_LINEAR = (
    "import pylora, torch; w = pylora.quantize_nf4(torch.randn(4, 64)); "
    "print(pylora.explain('nf4_linear', torch.randn(2, 64), w))"
)


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_use_backend_nests_and_restores() -> None:
    assert dispatch.forced_backend() is None
    with pylora.use_backend("reference"):
        assert [b.name for b in dispatch.candidates()] == ["reference"]
        with pytest.raises(ValueError, match="name is 'gpu'; it must be one of reference, cpu"):
            with pylora.use_backend("gpu"):
                pass
        assert dispatch.forced_backend() == "reference"
    assert dispatch.forced_backend() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="name is 'cuda', which cannot run here: "):
        with pylora.use_backend("cuda"):
            pass


def test_environment_chooses_the_backend() -> None:
    code = EXPLAIN_NF4_LINEAR
    result = python("-c", code, PYLORA_BACKEND="reference")
    assert result.stdout.startswith("nf4_linear: reference (pure PyTorch)"), result.stderr
    assert "asked for: reference" in result.stdout
    result = python("-c", code, PYLORA_BACKEND="fast")
    assert "PYLORA_BACKEND is 'fast'; it must be one of" in result.stderr


@pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_runs_on_the_cpu_only_when_asked_for() -> None:
    result = python("-c", EXPLAIN_NF4_LINEAR, PYLORA_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.stdout.startswith("nf4_linear: triton (fused tiles; interpreter)"), result.stderr
    result = python("-c", EXPLAIN_NF4_LINEAR, TRITON_INTERPRET="1")
    assert "not triton: Triton's interpreter runs only if it is asked for" in result.stdout
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; "
    result = python("-c", late + EXPLAIN_NF4_LINEAR, PYLORA_BACKEND="triton", TRITON_INTERPRET="0")
    assert "TRITON_INTERPRET=1 was set after triton was imported" in result.stderr


def test_importing_pylora_imports_no_triton() -> None:
    """Importing Triton takes a second, and a CPU without the interpreter never needs it."""
    code = EXPLAIN_NF4_LINEAR + "; import sys; print('triton' in sys.modules)"
    result = python("-c", code, TRITON_INTERPRET="0")
    assert result.stdout.rstrip().endswith("False"), result.stdout + result.stderr


def test_explain_says_why_each_other_backend_was_rejected() -> None:
    w = pylora.quantize_nf4(torch.randn(48, 128))
    x = torch.randn(2, 128)
    explanation = pylora.explain("nf4_linear", x, w)
    assert "cuda" in explanation.rejected and "triton" in explanation.rejected
    if extension.load()[0] is not None:
        assert explanation.backend == "cpu" and explanation.compiled_for in str(explanation)
        double = pylora.explain("nf4_linear", x.double(), w)
        assert double.backend == "reference"
        assert "x is torch.float64" in double.rejected["cpu"]
        dense = torch.randn(48, 128), torch.randn(4, 128), torch.randn(48, 4), 1.0
        assert pylora.explain("lora_linear", x, *dense).backend == "cpu"
        many = pylora.explain("lora_linear", torch.randn(9, 128), *dense)
        assert "dense" in many.rejected["cpu"]
    with pytest.raises(ValueError, match="op is 'matmul'; it must be one of bottleneck"):
        pylora.explain("matmul")


def test_forced_backend_falls_back_to_the_reference_visibly() -> None:
    if extension.load()[0] is None:
        pytest.skip("the extension is not built")
    w = pylora.quantize_nf4(torch.randn(48, 128))
    x = torch.randn(2, 128, dtype=torch.float64)
    with pylora.use_backend("cpu"):
        explanation = pylora.explain("nf4_linear", x, w)
        assert F.nf4_linear(x, w).dtype == torch.float64
    assert explanation.backend == "reference" and explanation.forced == "cpu"


def test_info_and_check_run_from_the_command_line() -> None:
    result = python("-m", "pylora", "info")
    assert result.returncode == 0, result.stderr
    assert "backends, fastest first:" in result.stdout and "nf4_linear:" in result.stdout
    options = ("--seed", "3", "--op", "lora_linear", "--op", "lora_linear_backward")
    result = python("-m", "pylora", "check", *options, "--tokens", "1,9")
    assert result.returncode == 0, result.stdout + result.stderr
    if extension.load()[0] is not None:
        assert "lora_linear_backward" in result.stdout and " of " in result.stdout
    if dispatch.BACKENDS["cuda"].unavailable() is not None:
        result = python("-m", "pylora", "check", "--backend", "cuda")
        assert result.returncode == 1 and "not run: cuda: " in result.stdout


def test_check_fails_on_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check notices a kernel that gets one output in a thousand wrong by one percent."""
    from pylora import selfcheck
    from pylora.backends.backend import Backend, Plan
    from pylora.calls import Nf4LinearCall
    from pylora.reference import nf4_linear

    def wrong(call: Nf4LinearCall) -> torch.Tensor:
        y = nf4_linear(call)
        return y * (1 + 0.01 * (torch.arange(y.numel()) % 1000 == 0).view(y.shape))

    planners = {Nf4LinearCall: lambda call: Plan("wrong", wrong)}
    backend = Backend("cuda", planners, lambda: None, str, lambda: "cpu")
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", backend)
    monkeypatch.setattr(selfcheck, "checked_backends", lambda: iter([("cuda", "", None)]))
    outcomes = list(selfcheck.run())
    assert outcomes and any(outcome.failure is not None for outcome in outcomes)


def test_threads_ask_for_backends_of_their_own() -> None:
    """Two blocks overlap and end in the order in which they began."""
    in_first, in_second, first_ended = (threading.Event() for _ in range(3))
    seen: dict[str, list[str | None]] = {"first": [], "second": []}

    def first() -> None:
        with pylora.use_backend("reference"):
            in_first.set()
            in_second.wait(60)
            seen["first"].append(dispatch.forced_backend())
        seen["first"].append(dispatch.forced_backend())
        first_ended.set()

    def second() -> None:
        in_first.wait(60)
        seen["second"].append(dispatch.forced_backend())
        with pylora.use_backend("cpu"):
            in_second.set()
            first_ended.wait(60)
            seen["second"].append(dispatch.forced_backend())

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {"first": ["reference", None], "second": [None, "cpu"]}
    assert dispatch.forced_backend() is None


def test_a_layer_shared_by_threads_runs_on_what_each_asks_for() -> None:
    layer, x = pylora.nn.NF4Linear(64, 48), torch.randn(4, 64)
    layer(x)
    plans: dict[str, set[str]] = {"reference": set(), "cpu": set()}

    def many_calls(name: str) -> None:
        with pylora.use_backend(name):
            for _ in range(200):
                layer(x)
                plans[name].add(layer._kept.call_with(x)._plan.run.__module__)

    threads = [threading.Thread(target=many_calls, args=(name,)) for name in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not plans["reference"] & plans["cpu"]
    assert len(plans["reference"]) == len(plans["cpu"]) == 1


@pytest.mark.parametrize("kept", [False, True])
def test_a_backward_runs_on_what_its_forward_was_asked_for(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    choose = dispatch.choose

    def recorded(call: Any) -> Any:
        asked.append(dispatch.asked_for())
        return choose(call)

    layer, x = pylora.nn.NF4Linear(64, 48), torch.randn(4, 64, requires_grad=True)
    with pylora.use_backend("reference"):
        layer(x)
        y = layer(x) if kept else F.nf4_linear(x, layer.nf4_weight)
    monkeypatch.setattr(dispatch, "choose", recorded)
    thread = threading.Thread(target=lambda: y.sum().backward(retain_graph=True))
    thread.start()
    thread.join(60)
    assert asked == ["reference"]
    with pylora.use_backend("cpu"):
        y.sum().backward()
    assert asked == ["reference", "cpu"] and dispatch.asked_for() is None
