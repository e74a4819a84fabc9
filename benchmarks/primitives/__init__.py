"""Rates of what the kernels are made of, measured one by one: `python -m benchmarks.primitives`."""
