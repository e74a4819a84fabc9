"""Everything that needs a GPU, in one command and under ten minutes.

    make gpu                      results under build/gpu (OUT=... for another folder)
    make gpu DRY=1                all but the launches: what can be known without a GPU
    make gpu STEPS="racecheck-cuda initcheck-cuda"
                                  these steps alone; those two are not among the ten minutes
    python3 benchmarks/gpu.py [--out FOLDER] [--dry] [--wheels FOLDER] [--steps NAME ...]

Needs torch, Triton, nvcc, pybind11 and ninja, and no network. Where this Python has no pylora, an
environment over its packages is made beside the results, pylora built in it for the GPU at hand,
and the wheels of --wheels (such as bitsandbytes) installed. A step that fails does not end the run;
the exit code is 1 where one did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A command of the run.

    dry           replaces it where nothing may be launched; None: left out
    path_of_root  Python finds the packages of the repository, such as benchmarks
    on_request    left out unless it is asked for by name
    """

    name: str
    command: list[str]
    seconds: int
    dry: list[str] | None
    path_of_root: bool = False
    on_request: bool = False


def architecture(python: str) -> str:
    """ "90a" of the first CUDA device, "" without one."""
    code = (
        "import torch; ok = torch.cuda.is_available(); "
        "print('%d%d' % torch.cuda.get_device_capability() if ok else '')"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    return {"90": "90a"}.get(found, found)


def environment(out: Path, wheels: Path | None) -> tuple[str, list[Step]]:
    """(the Python to use, the steps that make it)."""
    if importlib.util.find_spec("pylora") is not None:
        return sys.executable, []
    folder = out / "environment"
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    create = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)]
    steps = [
        Step("environment", create, 60, create),
        Step("build", [*pip, "--no-build-isolation", "--editable", str(ROOT)], 240, None),
    ]
    if wheels is not None:
        found = sorted(map(str, wheels.glob("*.whl")))
        steps.append(Step("wheels", [*pip, *found], 60, [*pip, *found]))
    return python, steps


def plan(python: str, out: Path) -> list[Step]:
    safe = [python, "-P", "-m"]
    bench = [python, "-m", "benchmarks"]
    results = out / "results"
    run = [*bench, "run", "--suite", "quick", "--device", "cuda", "--out", str(results)]
    tests = [*safe, "pytest", "tests", "-q"]
    absent = shutil.which("compute-sanitizer") is None

    def sanitized(tool: str, backend: str, seconds: int, on_request: bool = absent) -> Step:
        """On the small shapes of the check. The CPU's kernels would be slow under it, and have a
        sanitizer of their own (make asan)."""
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += [*safe, "pylora", "check", "--backend", backend]
        return Step(f"{tool}-{backend}", command, seconds, None, on_request=on_request)

    return [
        Step("facts", ["nvidia-smi"], 30, None),
        Step("info", [*safe, "pylora", "info"], 60, [*safe, "pylora", "info"]),
        Step("check", [*safe, "pylora", "check"], 120, [*safe, "pylora", "check"]),
        Step("tests", [*tests, "-m", "gpu"], 150, [*tests, "--collect-only"]),
        sanitized("memcheck", "cuda", 120),
        sanitized("memcheck", "triton", 120),
        sanitized("racecheck", "cuda", 300, on_request=True),
        sanitized("initcheck", "cuda", 300, on_request=True),
        Step("benchmarks", run, 270, [*bench, "list"], path_of_root=True),
        Step("report", [*bench, "report", str(results)], 60, None, path_of_root=True),
    ]


def run_step(step: Step, out: Path, dry: bool) -> dict[str, object]:
    command = step.dry if dry else step.command
    if command is None:
        return {"step": step.name, "status": "not in a dry run", "seconds": 0.0}
    print(f"== {step.name}", flush=True)
    environment = dict(os.environ)
    if step.path_of_root:
        environment.pop("PYTHONSAFEPATH", None)
    begin = time.perf_counter()
    log = out / f"{step.name}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=step.seconds,
            )
            status = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"over {step.seconds} s"
        except FileNotFoundError:
            status = f"{command[0]} was not found"
    if status != "ok":
        print("".join(log.read_text().splitlines(keepends=True)[-15:]), flush=True)
    seconds = round(time.perf_counter() - begin, 1)
    return {"step": step.name, "status": status, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.py")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--dry", action="store_true", help="all but the launches")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install")
    parser.add_argument("--steps", nargs="*", metavar="NAME", help="these steps alone")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    python, steps = environment(out, arguments.wheels)
    arch = architecture(sys.executable)
    if not arch and not arguments.dry:
        print("torch finds no CUDA device; --dry does what can be done without one")
        return 1
    os.environ.setdefault("PYLORA_CUDA_ARCHS", arch or "90a")
    planned = plan(python, out)
    if arguments.steps:
        unknown = set(arguments.steps) - {step.name for step in planned}
        if unknown:
            known = ", ".join(step.name for step in planned)
            parser.error(f"--steps names {', '.join(sorted(unknown))}; there are {known}")
        planned = [step for step in planned if step.name in arguments.steps]
    else:
        planned = [step for step in planned if not step.on_request]
    done = [run_step(step, out, arguments.dry) for step in [*steps, *planned]]
    (out / "steps.json").write_text(json.dumps(done, indent=1) + "\n")
    for entry in done:
        print(f"{entry['step']:15} {entry['seconds']:>7} s  {entry['status']}")
    return 0 if all(entry["status"] in ("ok", "not in a dry run") for entry in done) else 1


if __name__ == "__main__":
    sys.exit(main())
