"""The steps of a GPU run, their time limits, and the calls that group them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A borrowed machine may kill a command after 600 s. The other 60 s are for starting and packing.
BUDGET_S = 540


@dataclass(frozen=True)
class Step:
    """One command of the run.

    seconds      the time limit: the step is ended if it takes longer, and is not started if less
                 time is left
    environment  variables that are set for this step alone
    needs        Python packages without which the step is not started
    arch         the step is only for GPUs of this architecture; None if it is for all
    is_vital     if the step fails, the steps after it are not started
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    arch: str | None = None
    is_vital: bool = False


@dataclass(frozen=True)
class Target:
    """The machine and the folders of the steps.

    python  the Python that has torch
    arch    the architecture of the GPU, such as "90a"; "" in a dry run
    work    the folder for the logs and results of this call
    site    the folder into which `wheels` are installed; it is on PYTHONPATH
    cores   the cores that this process may use
    is_dry  the same steps run small on the CPU, and nothing is launched on a GPU
    """

    python: str
    arch: str
    work: Path
    site: Path
    cores: int
    wheels: tuple[Path, ...] = ()
    is_dry: bool = False


# A dry run must not fail on a slow or busy machine.
DRY_PATIENCE = 5

# Each call begins with the steps of FIRST. The first call has to compile, and so the limits of all
# its steps together are below the budget. The other calls find that build if the machine was kept,
# and have some time left to compile on another machine.
FIRST = ("wheels", "build")
CALLS: dict[str, tuple[str, ...]] = {
    "1": ("machine", "info", "check-cuda", "tests"),
    "2": ("primitives", "check-triton"),
    "3": ("sweep", "hopper-racecheck"),
    "4": ("goals", "memcheck-cuda", "memcheck-triton"),
    "5": ("goals-others",),
}
# lora_linear is measured first, in a call of its own: a cell takes some four seconds.
OTHER_OPS = ("nf4_dequantize", "nf4_quantize", "nf4_linear", "lora_qkv", "lora_mlp")
# The numbers of tokens in the three shapes of `pylora check` that are there for the Hopper kernel.
HOPPER_ROWS = "128,131,300"


def steps(target: Target) -> dict[str, Step]:
    """Returns all steps by name, in the order in which they run."""
    python, is_dry = target.python, target.is_dry
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install")
    pylora = (python, "-m", "pylora")
    pytest = (python, "-m", "pytest", "-v", "-m", "gpu")
    bench = (python, "-m", "benchmarks")
    # `python -m benchmarks` is found through the current folder, the root of the repository.
    from_root = {"PYTHONSAFEPATH": ""}
    results = target.work / "results"

    # The sanitizers are slow, and so is a CPU in a dry run: each kernel gets one shape.
    few_tokens = ("--tokens", "9,131" if is_dry else "1,8,9,131,513")

    def sanitized(tool: str, backend: str, *options: str) -> tuple[str, ...]:
        check = ("check", "--backend", "cpu" if is_dry else backend, *options)
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pylora, *check)

    def check(backend: str, seconds: int) -> Step:
        command = (*pylora, "check", "--backend", "cpu" if is_dry else backend)
        return Step(f"check-{backend}", (*command, *(few_tokens * is_dry)), seconds)

    hopper_ops = ("--op", "nf4_linear", "--op", "lora_linear", "--tokens", HOPPER_ROWS)

    def measure(name: str, seconds: int, *ops: str) -> Step:
        options = "--suite quick --device cuda"
        if is_dry:
            options = "--device cpu --shape 32x64 --tokens 2 --against dense,reference --threads 1"
            options += " --seconds 0 --no-memory"
        chosen = [word for op in ops[: 1 if is_dry else None] for word in ("--op", op)]
        command = (*bench, "run", *options.split(), *chosen, "--out", str(results))
        return Step(name, command, seconds, from_root, needs=("tqdm",))

    # Torch's allocator cuts tensors from one large piece of memory. Without it memcheck knows the
    # bounds of each tensor.
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    workers = str(max(1, target.cores * 3 // 4))

    site = ("--no-index", "--no-deps", "--upgrade", "--target", str(target.site))
    install = (python, "-m", "benchmarks.gpu.install", *(["--arch", target.arch] * (not is_dry)))
    primitives = ("--out", str(results / "primitives.json"), "--total", "230")
    sweep = ("--out", str(results / "sweep.json"), "--seconds", "340")
    if is_dry:  # these two can only measure a GPU
        primitives = ("--list", "--only", "products", "--only", "host")
        sweep += ("--help",)
    listed = [
        Step("wheels", (*pip, *site, *map(str, target.wheels)), 30),
        Step("build", install, 200, from_root, is_vital=True),
        Step("machine", ("nvidia-smi",), 15),
        Step("info", (*pylora, "info"), 25),
        check("cuda", 60),
        Step(
            "tests",
            (*pytest, "-n", workers, str(ROOT / "tests")),
            200,
            {"OMP_NUM_THREADS": "1"},
            needs=("pytest", "xdist", "pytest_timeout"),
        ),
        Step(
            "primitives",
            (python, "-m", "benchmarks.primitives", *primitives),
            290,  # it compiles before its 230 s begin
            from_root,
        ),
        check("triton", 200),  # nearly all of it is the time to compile
        Step("sweep", (*bench, "sweep", *sweep), 400, from_root, needs=("tqdm",)),
        Step(
            "hopper-racecheck",
            sanitized("racecheck", "cuda", *hopper_ops),
            90,
            arch="90a",
        ),
        measure("goals", 300, "lora_linear"),
        Step("memcheck-cuda", sanitized("memcheck", "cuda", *few_tokens), 95, no_cache),
        Step("memcheck-triton", sanitized("memcheck", "triton", *few_tokens), 95, no_cache),
        measure("goals-others", 450, *OTHER_OPS),
        Step("racecheck-cuda", sanitized("racecheck", "cuda"), 300),
        Step("initcheck-cuda", sanitized("initcheck", "cuda"), 300, no_cache),
    ]
    patience = DRY_PATIENCE if is_dry else 1
    return {step.name: replace(step, seconds=step.seconds * patience) for step in listed}


def chosen(target: Target, call: str | None, names: Sequence[str]) -> list[Step]:
    """Returns the steps of FIRST and after them those of a call, or those in `names`, or if neither
    is given those of all calls. A name is such as "tests", or "tests=400" with a limit in seconds.

    Raises ValueError if there is no such call or step.
    """
    known = steps(target)
    if call is not None and names:
        raise ValueError(f"a call ({call}) and steps ({', '.join(names)}) are given; give only one")
    if call is not None and call not in CALLS:
        raise ValueError(f"the call is {call!r}; it must be one of {', '.join(CALLS)}")
    limits: dict[str, int] = {}
    for word in names:
        name, _, seconds = word.partition("=")
        if name not in known:
            raise ValueError(f"the step is {name!r}; it must be one of {', '.join(known)}")
        if seconds and not (seconds.isdigit() and int(seconds)):
            raise ValueError(f"the limit of {name} is {seconds!r}; it must be whole seconds")
        limits[name] = int(seconds) if seconds else known[name].seconds
    if not names:
        of_calls = CALLS.values() if call is None else [CALLS[call]]
        limits = {name: known[name].seconds for call_ in of_calls for name in call_}
    first = [name for name in FIRST if name not in limits and (name != "wheels" or target.wheels)]
    limits = {name: known[name].seconds for name in first} | limits
    return [replace(known[name], seconds=limits[name]) for name in known if name in limits]
