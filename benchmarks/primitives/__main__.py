"""Runs `python -m benchmarks.primitives`, to be started in the root of the repository."""

from __future__ import annotations

import os
import sys

# Our folder kernels/ must not hide the Hugging Face package of that name. benchmarks/__main__.py
# says why it would.
_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]

from benchmarks.primitives.command_line import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
