"""Reports on the compiled kernels, read from their machine code without a GPU.

cuda.py             the table of the CUDA kernels
triton.py           the table of the Triton kernels
triton_launches.py  which Triton kernels there are to compile
sass.py             reads machine code and finds the main loop of a kernel
cycle_model.py      how many cycles each part of a GPU's multiprocessor is busy with a main loop
cost_model.py       how long a layer takes, if its launches run as fast as the tables say
"""
