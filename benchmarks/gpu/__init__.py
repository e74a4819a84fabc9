"""`make gpu`: everything that needs a GPU, in calls of less than ten minutes each.

It is made for a borrowed machine without a network, on which a command is killed after some minutes
and from which only a few files come back. docs/gpu-run.md gives the order of the calls.

steps.py      the steps, their time limits, and the calls that group them
run.py        runs the steps of one call, one after the other, within limits and a budget
archive.py    writes what a call leaves: results.tgz and summary.json
facts.py      prints what the machine is
install.py    the step that installs pylora: keeps, reuses or compiles its extension
stand_ins.py  programs that stand in for nvidia-smi and compute-sanitizer in a dry run
wheels.py     `make gpu-wheels`: small wheels to carry to the machine

Only facts.py imports torch: the process that watches the steps must not hold the GPU.
"""
