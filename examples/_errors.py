"""The one exception that the command line turns into a short message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the caller can put right: the message says what it was and what it must be."""
