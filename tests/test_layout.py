"""Rules of the architecture: imports point downward, one NF4 table a language, one stem an op."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pylora"
# The layers from the bottom up. A module imports only from its own layer or from below, also inside
# functions.
LAYERS = [
    (
        "pylora.nf4",
        "pylora.files",
        "pylora.call_parts",
        "pylora.calls",
        "pylora.settings",
        "pylora.sharding",
        "pylora.backends.limits",
    ),
    ("pylora.reference", "pylora.kernels", "pylora.bnb_format"),
    ("pylora.backends",),
    ("pylora.dispatch",),
    ("pylora.ops",),
    ("pylora.nf4_weight",),
    ("pylora.checks", "pylora.projections", "pylora.bottleneck", "pylora.dropout"),
    ("pylora.functional",),
    ("pylora.nn", "pylora.explain", "pylora.testing"),
    ("pylora.adapters",),
    ("pylora.models", "pylora.selfcheck"),
    ("pylora.integrations",),
    ("pylora", "pylora.__main__"),
]
# Arguments found by position: `args[6]`, `inputs[9:14]`, `[None] * 18`.
POSITIONS = re.compile(
    r"\b(args|arguments|inputs|others|flat|needs_input_grad)\[-?\d*:?-?\d*\]|\[None\] \* \d"
)
OPS = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_linear",
    "lora_linear",
    "dora_linear",
    "lora_qkv",
    "lora_mlp",
    "multi_lora_linear",
    "bottleneck_adapter",
    "multi_bottleneck_adapter",
)
# The bench files that are not named after an op, and why they exist.
BENCHES_BEYOND_OPS = {
    "host": "times the layers of pylora above the kernels, which is not the work of a single op",
    "dora_layer": "times nn.LoRALinear with DoRA, whose op is dora_linear, against PEFT's layer",
    "lora_layer": "times nn.LoRALinear against PEFT's layer, over NF4 and over dense weights",
    "lora_layer_autocast": "times the same under autocast, with LoRA in fp32",
    "lora_layer_dropout": "times training steps of the same with dropout on the low-rank path",
}


def layer(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for index, names in enumerate(LAYERS):
            if name in names and (name != "pylora" or length == len(parts)):
                return index
    raise AssertionError(f"{module} belongs to no layer")


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            if node.module == "pylora":
                modules.discard("pylora")
                modules |= {
                    f"pylora.{alias.name}"
                    for alias in node.names
                    if (PACKAGE / f"{alias.name}.py").exists() or (PACKAGE / alias.name).is_dir()
                }
    return {name for name in modules if name.split(".")[0] == "pylora"}


@pytest.mark.parametrize(
    "path",
    sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_imports_point_downward(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if not path.is_relative_to(PACKAGE):
        module = f"pylora.{module}"
    for name in imports(path):
        assert layer(name) <= layer(module), f"{module} imports {name}, which lies above it"


def test_no_import_circle() -> None:
    """A module that imports itself, even indirectly and within a layer, cannot be read alone."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    graph: dict[str, set[str]] = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        module = module if path.is_relative_to(PACKAGE) else f"pylora.{module}"
        # A package's __init__ imports its modules, which may import from each other.
        graph[module] = set() if path.name == "__init__.py" else imports(path)
    for start in graph:
        reached, left = set(), list(graph[start])
        while left:
            name = left.pop()
            if name not in reached:
                reached.add(name)
                left += graph.get(name, ())
        assert start not in reached, f"{start} imports itself through others"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_argument_is_found_by_its_position(path: Path) -> None:
    offending = [line for line in path.read_text().splitlines() if POSITIONS.search(line)]
    assert not offending, offending


@pytest.mark.parametrize("line", ["x = args[6]", "inputs[9:14]", "g = [None] * 18", "flat[-1]"])
def test_the_pattern_matches_arguments_found_by_position(line: str) -> None:
    assert POSITIONS.search(line)


def test_model_libraries_stay_above_the_kernels() -> None:
    for path in [
        *PACKAGE.glob("reference/*.py"),
        *PACKAGE.glob("ops/*.py"),
        *PACKAGE.glob("nn/*.py"),
    ]:
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (transformers|peft|bitsandbytes)", text, re.M), (
            path
        )


def test_one_nf4_table_per_language() -> None:
    def holders(*patterns: str) -> list[str]:
        files = [f for pattern in patterns for f in ROOT.glob(pattern)]
        return [str(f.relative_to(ROOT)) for f in files if "0.6961928" in f.read_text()]

    assert holders("pylora/**/*.py", "kernels/*.py") == ["pylora/nf4.py"]
    assert holders("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh") == [
        "csrc/common/nf4.h"
    ]


def test_inline_ptx_is_only_in_the_ptx_headers() -> None:
    cuda = ROOT / "csrc/cuda"
    files = [f for f in cuda.rglob("*") if f.is_file() and re.search(r"\basm\b", f.read_text())]
    assert {str(f.relative_to(cuda)) for f in files} == {"common/ptx.cuh", "hopper/ptx.cuh"}


def test_nf4_tables_agree() -> None:
    from pylora.nf4 import NF4_CODE

    text = (ROOT / "csrc/common/nf4.h").read_text()
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+(?=f)", text)]
    first = numbers.index(-1.0)
    assert tuple(numbers[first : first + 16]) == NF4_CODE


@pytest.mark.parametrize("op", OPS)
def test_one_stem_per_op(op: str) -> None:
    for folder in ("pylora/ops", "pylora/reference"):
        assert (ROOT / folder / f"{op}.py").exists()
    assert (ROOT / "tests" / f"test_{op}.py").exists()


def test_one_bench_per_op() -> None:
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*")}
    # Nobody calls dora_linear but the layers, which give it the norm of the rows.
    assert benches - BENCHES_BEYOND_OPS.keys() == set(OPS) - {"dora_linear"}
    assert benches >= BENCHES_BEYOND_OPS.keys()


def test_wheel_lists_every_package() -> None:
    """pyproject.toml lists the packages by hand. The wheel lacks a folder that is not listed."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(pylora[a-z_.]*)",', text.split("packages = [")[1].split("]")[0]))
    packages = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")
    } | {"pylora.kernels"}
    assert listed == packages
    assert not [p for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_old_names_are_gone() -> None:
    """Each concept has the one name that the glossary of CONTRIBUTING gives it."""
    old = re.compile(r"\b(few_rows|request_only|row_steps|as_rows|adapter_rows)\b", re.IGNORECASE)
    folders = ("pylora", "kernels", "csrc", "benchmarks", "examples", "tools")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*.*") if f.is_file()]
    sources = [f for f in files if f.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 300
    assert not [(f, match) for f in sources for match in old.findall(f.read_text())]


def test_files_are_short() -> None:
    patterns = (
        "pylora/**/*.py",
        "kernels/*.py",
        "csrc/**/*.*",
        "tests/*.py",
        "examples/**/*.py",
        "benchmarks/**/*.py",
    )
    lengths = {f: len(f.read_text().splitlines()) for p in patterns for f in ROOT.glob(p)}
    assert max(lengths.values()) <= 500, max(lengths, key=lambda f: lengths[f])
    assert sorted(lengths.values())[len(lengths) // 2] <= 250


def test_kernels_folder_hides_no_other_package(tmp_path: Path) -> None:
    """A Python in the repository root finds Hugging Face's `kernels`, if it is installed."""
    script = "import kernels; print(getattr(kernels, '__file__', None)); import kernels.lora_linear"
    package = tmp_path / "kernels"
    for is_installed in (False, True):
        if is_installed:
            package.mkdir()
            (package / "__init__.py").touch()
            (package / "lora_linear.py").write_text("print('the other one')")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if is_installed:
            assert result.stdout.split("\n")[:2] == [str(package / "__init__.py"), "the other one"]
        else:
            assert result.stdout == "None\n" and "No module named 'kernels.lora" in result.stderr


# Ops without a file of their own in kernels/ or csrc/, and why they need none.
WITHOUT_KERNEL = {
    "kernels": {
        "nf4_quantize": "Triton has no kernel for it: the C++ ones run on CPUs and GPUs",
        "dora_linear": "the backends compose it of their lora_linear",
    },
    "csrc": {
        "lora_qkv": "the backends compose it of their single-layer ops",
        "lora_mlp": "the backends compose it of their single-layer ops",
        "multi_bottleneck_adapter": "the backends run bottleneck_adapter on the tokens of each",
    },
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("folder", WITHOUT_KERNEL)
def test_kernels_of_an_op_have_its_stem(folder: str, op: str) -> None:
    stems = {path.stem for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert (op in stems) != (op in WITHOUT_KERNEL[folder])


def test_no_other_triton_file_has_the_stem_of_an_op() -> None:
    """What the ops share has a name of its own, so that a file with an op's stem is that op."""
    stems = {path.stem.removesuffix("_backward") for path in (ROOT / "kernels").glob("*.py")}
    assert not [stem for stem in stems if stem.startswith(OPS) and stem not in OPS]


def test_backends_run_ops_by_functions_of_their_names() -> None:
    from pylora import dispatch, reference
    from pylora.backends import cpu, extension, triton_runs

    names = {*OPS, *(f"{op}_backward" for op in OPS)}
    composed = {record.op for record in cpu.BACKEND.planners.keys() - cpu._PLANNERS.keys()}
    of_lora = {"dora_linear", "dora_linear_backward"}  # pylora/backends/dora.py makes these
    for backend, module, without in (
        ("reference", reference, set()),
        ("triton", triton_runs, of_lora),
        ("cpu", extension, composed),
        ("cuda", extension, composed),
    ):
        ops = set(dispatch.BACKENDS[backend].ops)
        assert ops <= names
        assert not [op for op in ops - without if not hasattr(module, op)]
