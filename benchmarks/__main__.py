"""Runs `python -m benchmarks`, which has to be started in the root of the repository."""

from __future__ import annotations

import os
import sys

# `python -m` puts the current folder first on sys.path. Our folder kernels/ would then be found as
# the top-level package `kernels` and hide the Hugging Face package of that name: transformers, PEFT
# and bitsandbytes look for it and fail on ours. Without the folder on sys.path, this package is
# still found by its own __path__, and pylora where it is installed.
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]

from benchmarks.command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
