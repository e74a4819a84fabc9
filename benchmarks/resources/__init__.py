"""What the compiled kernels need, read from their machine code: no GPU takes part.

`cuda` and `triton` make the committed tables of the two kinds of kernels. Both read the machine
code with `sass` and turn the main loop into cycles with `cycle_model`.
"""
