"""`python -m benchmarks.primitives`: measures the parts that kernels are made of, one by one."""
