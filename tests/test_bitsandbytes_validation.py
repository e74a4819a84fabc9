"""The example that shows what a validation pass does to bitsandbytes on a CPU runs everywhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import bitsandbytes_validation as example

bitsandbytes = pytest.importorskip("bitsandbytes")
has_avx512bf16 = pytest.importorskip("bitsandbytes.functional").has_avx512bf16


def test_the_example_tells_what_this_machine_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", has_avx512bf16)
    assert example.main() == 0
    out = capsys.readouterr().out
    numbers = re.findall(r"^(\S.*\S) +(\d+\.\d+) +(\d+\.\d+)$", out, re.MULTILINE)
    norms = {name: float(norm) for name, norm, _ in numbers}
    theirs, after, ours = norms.values()
    assert list(norms)[2].startswith("pylora")
    assert abs(ours - theirs) < 0.01 * theirs
    if has_avx512bf16():
        assert "repacked its layers" in out
    else:
        assert "does not repack on this CPU" in out
        assert abs(after - theirs) < 0.01 * theirs


def test_a_repacked_layer_is_recognized() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    network = example.Network([torch.nn.Linear(64, 64), layer])
    assert not example.repacked(network)
    layer.weight.quant_state.packing_format_for_cpu = True
    assert example.repacked(network)
