"""Benchmarks of pylora against its peers: `python -m benchmarks list|run|sweep|compare|report`.

One file an op (`bench_<op>.py`) gives the contenders, FLOP and bytes; one harness checks them all
against the numerics rule, times them and writes JSON; tables and plots read only JSON.
"""
