"""Benchmarks of pylora and its peers: `python -m benchmarks list|run|sweep|compare|report`.

Each op has a file bench_<op>.py, which gives the contenders and the least FLOP and bytes. One
harness checks every contender against the numerics rule, times it and writes JSON. Tables and
pictures read only the JSON.

contender.py      what a contender and a bench are; contenders_torch.py and contenders_peers.py have
                  the contenders for a linear layer, composed.py those for ops of several layers
harness.py        checks, times and measures contenders; runner.py runs it over a suite of shapes
calls.py          makes the calls that timing.py, cuda_timing.py and memory.py measure
layer_tensors.py  the random weights; linear_oracle.py and accuracy.py check what is made of them
results.py        the JSON of a run; machine.py and roofline.py add facts of the machine to it
heap.py           `run --keep-heap`, with which calls reuse the pages of earlier ones
report/           tables, pictures, goals and the page
sweep/            times every plan of the GPU kernels
primitives/       the rates of single instructions, copies and launches on a GPU
resources/        what the machine code says about the compiled kernels; needs no GPU
gpu/              `make gpu`: everything that needs a GPU, on a borrowed machine
"""
