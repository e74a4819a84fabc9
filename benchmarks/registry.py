"""Finds the bench of an op, and the contenders that a run asks for."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import (
    bench_bottleneck_adapter,
    bench_dora_layer,
    bench_host,
    bench_lora_layer,
    bench_lora_layer_autocast,
    bench_lora_layer_dropout,
    bench_lora_linear,
    bench_lora_mlp,
    bench_lora_qkv,
    bench_multi_bottleneck_adapter,
    bench_multi_lora_linear,
    bench_nf4_dequantize,
    bench_nf4_linear,
    bench_nf4_quantize,
)
from benchmarks.contender import Bench, Contender

BENCHES: dict[str, Bench] = {
    module.BENCH.op: module.BENCH
    for module in (
        bench_nf4_quantize,
        bench_nf4_dequantize,
        bench_nf4_linear,
        bench_lora_linear,
        # The quick suite leaves out the benches below: with them it would take over five minutes.
        bench_lora_layer,
        bench_lora_layer_autocast,
        bench_lora_layer_dropout,
        bench_dora_layer,
        bench_lora_qkv,
        bench_lora_mlp,
        bench_multi_lora_linear,
        bench_bottleneck_adapter,
        bench_multi_bottleneck_adapter,
        bench_host,
    )
}


def ops_of(suite: str) -> list[str]:
    """Returns the ops that a suite measures if the command line names none."""
    return [op for op, bench in BENCHES.items() if bench.in_quick or suite != "quick"]


def bench_of(op: str) -> Bench:
    """Returns the bench of an op. Raises ValueError if it has none."""
    if op not in BENCHES:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(BENCHES)}")
    return BENCHES[op]


def selected(bench: Bench, against: Sequence[str] | None, few: bool) -> list[Contender]:
    """Returns pylora and the contenders whose name contains one of the words of `against`. Without
    `against` these are all contenders, or if `few` is set those of the quick suite."""
    if against is None:
        return [c for c in bench.contenders if not (few and c.only_full)]
    return [
        c
        for c in bench.contenders
        if c.is_ours or any(word.lower() in c.name.lower() for word in against)
    ]


def check_against(against: Sequence[str]) -> None:
    """Raises ValueError if a word is not part of any contender's name."""
    names = {c.name for bench in BENCHES.values() for c in bench.contenders}
    for word in against:
        if not any(word.lower() in name.lower() for name in names):
            raise ValueError(
                f"--against has {word!r}; each word must be part of one of these names: "
                f"{', '.join(sorted(names))}"
            )
