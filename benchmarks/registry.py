"""The benches by op."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import (
    bench_host,
    bench_lora_linear,
    bench_lora_mlp,
    bench_lora_qkv,
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
        # With these the quick suite would take more than five minutes: they are of the full one.
        bench_lora_qkv,
        bench_lora_mlp,
        bench_multi_lora_linear,
        bench_host,
    )
}


def ops_of(suite: str) -> list[str]:
    """The ops that a suite measures where none is named."""
    return [op for op, bench in BENCHES.items() if bench.in_quick or suite != "quick"]


def bench_of(op: str) -> Bench:
    """Raises ValueError for an op without a bench."""
    if op not in BENCHES:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(BENCHES)}")
    return BENCHES[op]


def selected(bench: Bench, against: Sequence[str] | None, few: bool) -> list[Contender]:
    """pylora and the contenders asked for: all of the suite, or those whose name holds one of the
    words of `against`."""
    if against is None:
        return [c for c in bench.contenders if not (few and c.only_full)]
    return [
        c
        for c in bench.contenders
        if c.is_ours or any(word.lower() in c.name.lower() for word in against)
    ]


def check_against(against: Sequence[str]) -> None:
    """Raises ValueError for a word that no contender's name holds."""
    names = {c.name for bench in BENCHES.values() for c in bench.contenders}
    for word in against:
        if not any(word.lower() in name.lower() for name in names):
            raise ValueError(
                f"--against has {word!r}; each word must be part of one of these names: "
                f"{', '.join(sorted(names))}"
            )
