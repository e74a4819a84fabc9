"""`python -m benchmarks sweep`: times every plan of the GPU kernels, not only the best ones.

kernels.py  which kernels there are, and the plans of each
run.py      which points are measured in which order
measure.py  checks and times one point
file.py     the JSON that holds the points
"""
