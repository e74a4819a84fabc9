"""`make gpu`: all that needs a GPU, in calls that each end within ten minutes.

It is made for a borrowed machine without a network, where a command is killed after some minutes
and only a few files come back. docs/gpu-run.md says in which order to make the calls.

steps.py      what is run: the steps, their time limits, and the calls that group them
run.py        runs the steps of one call, one after the other, within limits and a budget
archive.py    what a call leaves: results.tgz and summary.json
facts.py      what the machine is
install.py    the step that installs pylora: keeps, reuses or compiles its extension
stand_ins.py  programs that stand in for nvidia-smi and compute-sanitizer in a dry run
wheels.py     `make gpu-wheels`: small wheels to carry to the machine

Nothing here but facts.py imports torch: the process that watches the steps must not hold the GPU.
"""
