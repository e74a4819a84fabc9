"""What people read: tables, pictures, goals and the page. It all reads only the JSON of runs.

tables.py       a table on the console for a cell, for an op, and for two runs that are compared
cpu_table.py    the README's part about a CPU, with ratio_table.py and memory_table.py; its other
                parts are made by gpu_table.py and methods_table.py, and readme.py puts them in
host_tables.py  the table of host times
goals.py        the goals on a CPU and, with cuda_goals.py, those on a GPU
plots.py        the pictures
page.py         `python -m benchmarks report`: all of it in one HTML file
host_page.py    the part of that file about host times
models_page.py  the part of that file about whole models
"""
