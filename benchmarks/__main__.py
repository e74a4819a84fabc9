"""`python -m benchmarks`, started in the repository root."""

from __future__ import annotations

import os
import sys

# `python -m` puts the current folder first on sys.path. Our folder kernels/ would then be found as
# the top-level package `kernels` and hide Hugging Face's package of that name: transformers, PEFT
# and bitsandbytes probe for it and fail on ours. This package is found by its own __path__ from
# here on, and pylora by its installation.
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]

from benchmarks.command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
