"""Programs that stand in for nvidia-smi and compute-sanitizer in a dry run.

They write their arguments into a file and run the command that stands behind the options, so that
a dry run goes through the same steps as a real one.
"""

from __future__ import annotations

from pathlib import Path

CALLS = "stand-ins.log"

# What an option of compute-sanitizer is followed by: `--tool memcheck --error-exitcode 1 program`.
_SCRIPTS = {
    "nvidia-smi": 'echo "nvidia-smi $*" >> "{calls}"\necho "a dry run has no GPU"\n',
    "compute-sanitizer": (
        'echo "compute-sanitizer $*" >> "{calls}"\n'
        'while [ "${{1#--}}" != "$1" ]; do shift 2; done\n'
        'exec "$@"\n'
    ),
}


def write(folder: Path, work: Path) -> Path:
    """The folder of the stand-ins, made anew; each call of one adds a line to work/CALLS."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in _SCRIPTS.items():
        program = folder / name
        program.write_text("#!/bin/sh\n" + script.format(calls=work / CALLS))
        program.chmod(0o755)
    return folder
