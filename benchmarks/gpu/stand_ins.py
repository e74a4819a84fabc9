"""Programs that stand in for nvidia-smi and compute-sanitizer in a dry run.

They write their arguments into a file. The one for compute-sanitizer then runs the program after
its options, so that a dry run has the same steps as a real one.
"""

from __future__ import annotations

from pathlib import Path

CALLS = "stand-ins.log"

# A command is such as `compute-sanitizer --tool memcheck --error-exitcode 1 program`, in which each
# option has a value.
_SCRIPTS = {
    "nvidia-smi": 'echo "nvidia-smi $*" >> "{calls}"\necho "a dry run has no GPU"\n',
    "compute-sanitizer": (
        'echo "compute-sanitizer $*" >> "{calls}"\n'
        'while [ "${{1#--}}" != "$1" ]; do shift 2; done\n'
        'exec "$@"\n'
    ),
}


def write(folder: Path, work: Path) -> Path:
    """Writes the programs into `folder` and returns it. Each program that is run adds a line to the
    file CALLS in `work`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in _SCRIPTS.items():
        program = folder / name
        program.write_text("#!/bin/sh\n" + script.format(calls=work / CALLS))
        program.chmod(0o755)
    return folder
