"""Whole models: the time of a training step and of a decoded token, and the peak memory of a step.

families.py      the models
bitsandbytes_layers.py
                 their layers in 4 bits
contenders.py    who trains them: PEFT over bitsandbytes, the same through pylora, and others
measure.py       time and memory of one model
results.py       the JSON file
table.py         the table
run.py           `python -m benchmarks models`: all of them
"""
