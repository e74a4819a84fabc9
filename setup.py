"""Builds the extension `pylora._C`; everything else about the package is in pyproject.toml.

    MAX_JOBS            compilations at a time (default: the number of cores)
    CXX                 the C++ compiler (default: c++, g++ or clang++)
    CUDA_HOME           the CUDA toolkit (default: that of the nvcc on PATH); empty: no GPU kernels
    PYLORA_CUDA_ARCHS   the GPU architectures, such as "80;90a;100+PTX"; "all" for a
                        wheel that others install (default: that of the GPUs in this machine)
    PYLORA_BUILD_CACHE  where compiled CUDA files are kept by content (default: build/objects)
    PYLORA_EXTENSION    a compiled extension to install as it is, instead of compiling
    PYLORA_SANITIZE     builds with -fsanitize=..., such as "address,undefined" (see `make asan`)

What is missing is left out with one line that says so: without nvcc or a GPU the GPU kernels,
without a compiler or torch the whole extension (pylora then runs on PyTorch alone).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# pip builds without this folder on the path of modules.
sys.path.insert(0, str(ROOT / "tools"))
from kept_objects import content_key, kept_object, tool_version  # noqa: E402, F401

sys.path.pop(0)

# The oldest torch whose stable ABI has all we call; one build then serves it and every later one.
TORCH_TARGET = (2, 10)

# A GPU runs binaries of its own major version up to its own minor one (90a: on 9.0 alone). PTX is
# for those with none here, such as 11.0 and what follows 12.x. It must not be newer than they are:
# that of 120 would leave out 11.0.
CUDA_ARCHS = "80;86;89;90a;100+PTX;120"

CXX_FLAGS = [
    "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    # A product and a sum are two roundings unless a kernel asks for a fused one: results are those
    # of the reference whatever the instruction set.
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    # GCC 12 sees its own AVX-512 intrinsics read a variable that is undefined on purpose.
    "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option",
]  # fmt: skip

SANITIZE = os.environ.get("PYLORA_SANITIZE", "")
if SANITIZE:
    # Optimized as little as the intrinsics allow: what they inline is still checked, and compiling
    # takes half as long.
    CXX_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"]
# By the end of a file's name; every other file is compiled for the baseline of its architecture.
ISA_FLAGS = {
    "_avx2": _AVX2,
    "_avx512": _AVX512,
    "_avx512_bf16": _AVX512_BF16,
    "_amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}


def say(line: str) -> None:
    print(f"pylora: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Step:
    """One command of the build: `output` is made from `inputs`."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    home: Path
    version: str
    archs: list[str]

    @classmethod
    def find(cls, archs: str | None = None) -> Cuda | str:
        """The toolkit, for `archs` or what PYLORA_CUDA_ARCHS asks for; or why there is none."""
        home = os.environ.get("CUDA_HOME")
        if home == "":
            return "CUDA_HOME is empty"
        found = shutil.which("nvcc", path=f"{home}/bin" if home is not None else None)
        if found is None:
            return "nvcc was not found (CUDA_HOME, PATH)"
        nvcc = Path(found)
        release = re.search(r"release (\d+\.\d+)", tool_version(found))
        version = release.group(1) if release else "unknown"
        asked = archs or os.environ.get("PYLORA_CUDA_ARCHS")
        chosen = cls._known(nvcc) if asked == "all" else re.split(r"[;,\s]+", asked or "")
        if not asked:
            gpus = gpu_capabilities()
            fitting = {arch_for(gpu, cls._known(nvcc)) for gpu in gpus}
            chosen = sorted(arch for arch in fitting if arch is not None)
            if not chosen:
                here = f"a GPU of {', '.join(gpus)}, which is too old" if gpus else "no GPU"
                return (
                    f"nvcc {version} is here, but nvidia-smi lists {here}; to compile for other "
                    "GPUs set PYLORA_CUDA_ARCHS to a list such as 80;90a, or to all"
                )
        # What is on PATH may be a link or a script; nvcc itself knows where it lies.
        dry_run = [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]
        output = subprocess.run(dry_run, capture_output=True, text=True)
        here = re.search(r"_HERE_=(.+)", output.stderr + output.stdout)
        return cls(
            nvcc,
            Path(here.group(1).strip()).parent if here else nvcc.resolve().parent.parent,
            version,
            [arch for arch in (name.replace(".", "") for name in chosen) if arch],
        )

    @staticmethod
    def _known(nvcc: Path) -> list[str]:
        """CUDA_ARCHS, less those that an older nvcc has never heard of."""
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        archs = CUDA_ARCHS.split(";")
        if listed.returncode != 0:
            return archs
        known = listed.stdout.split()
        return [arch for arch in archs if "sm_" + re.sub(r"\D.*", "", arch) in known]

    def flags(self) -> list[str]:
        """What decides the machine code, beside the sources and the version of nvcc."""
        return ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", *self.gencode()]

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX")
            kinds = [f"sm_{number}"] + [f"compute_{number}"] * (number != arch)
            flags += ["-gencode", f"arch=compute_{number},code=[{','.join(kinds)}]"]
        return flags

    def static_runtime(self) -> Path:
        """Static, so that the module loads where there is neither a GPU nor a CUDA library."""
        machine = platform.machine()
        for folder in ("lib64", "lib", f"targets/{machine}-linux/lib", f"lib/{machine}-linux-gnu"):
            library = self.home / folder / "libcudart_static.a"
            if library.exists():
                return library
        raise SystemExit(
            f"pylora: nvcc is {self.nvcc}, but libcudart_static.a is not below {self.home}: "
            "point CUDA_HOME to a whole toolkit, or leave it empty to build without GPU kernels"
        )


def gpu_capabilities() -> list[str]:
    """Such as "9.0", of the GPUs in this machine; none where nvidia-smi finds none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True)
    return re.findall(r"^\d+\.\d+$", output.stdout, re.M) if output.returncode == 0 else []


def arch_for(capability: str, archs: Sequence[str]) -> str | None:
    """The one of `archs` whose code a GPU runs best: its own, else the newest PTX before it."""
    major, minor = map(int, capability.split("."))

    def version(arch: str) -> tuple[int, int]:
        number = int(re.sub(r"\D.*", "", arch))
        return number // 10, number % 10

    def runs(arch: str) -> bool:
        if "a" in arch:
            return version(arch) == (major, minor)
        return version(arch)[0] == major and version(arch)[1] <= minor

    own = [arch for arch in archs if runs(arch)]
    ptx = [arch for arch in archs if arch.endswith("+PTX") and version(arch) < (major, minor)]
    return max(own or ptx, key=version, default=None)


def source_digest() -> str:
    """The same for the same sources and flags; a compiled extension says from which it was made."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted((ROOT / "csrc").glob("**/*.[ch]*"))]:
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def torch_folder() -> Path | None:
    """Where torch is installed. Its version and headers are files: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def find_compiler() -> list[str] | None:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def extension_or_reason() -> tuple[list[Extension], str | None]:
    """The extension, or why it cannot be built here."""
    if sys.platform != "linux":
        return [], f"the extension is built on Linux alone, and this is {sys.platform}"
    if torch_folder() is None:
        return [], "torch is not installed where this build runs"
    torch_version = importlib.metadata.version("torch")
    if tuple(map(int, torch_version.split(".")[:2])) < TORCH_TARGET:
        return [], "torch is {}, and the extension needs {}.{}".format(torch_version, *TORCH_TARGET)
    if importlib.util.find_spec("pybind11") is None:
        return [], "pybind11 is not installed where this build runs"
    compiler = find_compiler()
    if compiler is None or shutil.which(compiler[0]) is None:
        return [], "no C++ compiler was found (tried CXX, c++, g++, clang++)"
    # What a source distribution must hold; what is compiled, and how, is decided below.
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))]
    files.append("tools/kept_objects.py")
    sources = [file for file in files if file.endswith((".cpp", ".cu"))]
    return [Extension("pylora._C", sources, depends=files)], None


@dataclass(frozen=True)
class Compilation:
    """How each source is compiled. tools/torch_headers.py runs the same commands."""

    compiler: list[str]
    torch_include: Path
    cuda: Cuda | None
    version: str

    def command(self, path: Path) -> list[str] | None:
        """The command without input and output; None if this build leaves the source out."""
        on_gpu = path.parts[1] == "cuda"
        if on_gpu and self.cuda is None:
            return None
        if path.suffix == ".cu":
            return [
                str(self.cuda.nvcc), *self.cuda.flags(), "-ccbin", self.compiler[-1],
                "-Xcompiler", "-fPIC,-fvisibility=hidden",
            ]  # fmt: skip
        isa = isa_flags(path.stem)
        if path.suffix != ".cpp" or isa is None:
            return None
        command = [*self.compiler, *CXX_FLAGS, "-Icsrc", *isa]
        if path.name == "bindings.cpp":
            command += self._python_flags()  # before torch's, which may hold a pybind11 of its own
        if is_torch_facing(path):
            command += self._torch_flags()
        if path.name == "source_digest.cpp":
            command += [f'-DPYLORA_SOURCE_DIGEST="{source_digest()}"']
        if on_gpu:
            command += ["-isystem", f"{self.cuda.home}/include"]
        return command

    def cuda_objects(self, sources: Iterable[Path]) -> dict[Path, Path]:
        """The object of each CUDA file, compiled or from earlier."""

        def compiled(source: Path) -> tuple[Path, bool]:
            command = self.command(source.relative_to(ROOT))
            assert command is not None and self.cuda is not None
            tools = (str(self.cuda.nvcc), self.compiler[-1])
            return kept_object(command, source, [ROOT / "csrc"], tools, ["-t", str(max_jobs())])

        sources = list(sources)
        with ThreadPoolExecutor(max_jobs()) as pool:
            objects = list(pool.map(compiled, sources))
        reused = sum(old for _, old in objects)
        say(f"{len(objects) - reused} CUDA files compiled, {reused} as they were compiled earlier")
        return {source: path for source, (path, _) in zip(sources, objects, strict=True)}

    def _torch_flags(self) -> list[str]:
        target = "0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)
        # -isystem keeps warnings about torch's own headers out.
        return ["-isystem", str(self.torch_include), f"-DTORCH_TARGET_VERSION={target}"]

    def _python_flags(self) -> list[str]:
        import pybind11

        flags = [
            "-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include(),
            f'-DPYLORA_VERSION="{self.version}"',
            f'-DPYLORA_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"',
        ]  # fmt: skip
        if self.cuda is not None:
            flags += [
                f'-DPYLORA_CUDA_VERSION="{self.cuda.version}"',
                "-DPYLORA_CUDA_ARCHS=" + ",".join(f'"{arch}"' for arch in self.cuda.archs),
            ]
        return flags


def cuda_files() -> list[Path]:
    return sorted((ROOT / "csrc").glob("**/*.cu"))


def is_torch_facing(path: Path) -> bool:
    """Only bindings.cpp and the bind files see torch's headers; kernels take raw pointers."""
    return path.suffix == ".cpp" and path.name.startswith("bind")


class BuildExtension(build_ext):
    """Compiles file by file, with flags by file name, which setuptools' own compiler cannot do.

    Objects stay in build/ beside this file, not in setuptools' temporary folder: a second
    `pip install -e .` then compiles only what has changed.
    """

    def build_extension(self, ext: Extension) -> None:
        given = os.environ.get("PYLORA_EXTENSION")
        if given:
            say(f"the extension is {given}, and nothing is compiled")
            self._put(Path(given), ext)
            return
        tag = "-".join([sys.implementation.cache_tag, *SANITIZE.split(",")]).rstrip("-")
        objects = ROOT / "build" / tag
        objects.mkdir(parents=True, exist_ok=True)
        found = Cuda.find()
        cuda = found if isinstance(found, Cuda) else None
        if cuda is None:
            say(f"building without the GPU kernels: {found}")
        else:
            say(f"GPU kernels with CUDA {cuda.version} for {', '.join(cuda.archs)}")
        torch_include = torch_folder() / "include"
        version = self.distribution.get_version()
        compilation = Compilation(find_compiler(), torch_include, cuda, version)
        steps = self._compile_steps(objects, compilation)
        linked = [step.output for step in steps]
        if cuda is not None:
            linked += compilation.cuda_objects(cuda_files()).values()
        built = objects / "_C.so"
        steps.append(self._link_step(built, linked, cuda))
        run_steps(objects, steps)
        self._put(built, ext)

    def _put(self, built: Path, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed: to write into a file that a running Python has mapped would crash it.
        copy = target.with_name(f".{target.name}-{os.getpid()}")
        shutil.copy2(built, copy)
        os.replace(copy, target)

    def _compile_steps(self, objects: Path, compilation: Compilation) -> list[Step]:
        steps = []
        for source in sorted((ROOT / "csrc").glob("**/*.cpp")):
            path = source.relative_to(ROOT)
            output = objects / path.with_suffix(f"{path.suffix}.o")
            depfile = Path(f"{output}.d")
            command = compilation.command(path)
            if command is None:
                continue
            command += ["-MD", "-MF", str(depfile), "-c", str(path), "-o", str(output)]
            steps.append(Step(output, [source], command, depfile))
        return steps

    def _link_step(self, built: Path, objects: list[Path], cuda: Cuda | None) -> Step:
        torch_lib = torch_folder() / "lib"
        command = [*find_compiler(), "-shared", "-o", str(built), *map(str, objects)]
        command += [f"-fsanitize={SANITIZE}"] * bool(SANITIZE)
        # Torch is in the process before us, hence no rpath. libtorch.so brings in the CUDA half of
        # a torch that has one; we name no symbol of it, so the linker must be told to keep it.
        command += [
            f"-L{torch_lib}",
            "-Wl,--no-as-needed",
            "-ltorch_cpu",
            "-ltorch",
            "-Wl,--as-needed",
        ]
        if cuda is not None:
            command += [str(cuda.static_runtime()), "-ldl", "-lrt", "-lpthread"]
        # The runtime's symbols stay inside: torch may have loaded another version of it.
        command += ["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
        command += ["-Wl,-s"] * (not SANITIZE)
        return Step(built, objects, command)


def isa_flags(stem: str) -> list[str] | None:
    """Flags for a C++ file by the end of its name; None if it is for another kind of processor."""
    for suffix in sorted(ISA_FLAGS, key=len, reverse=True):
        if stem.endswith(suffix):
            return ISA_FLAGS[suffix] if platform.machine() in ("x86_64", "AMD64") else None
    return []


def max_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def run_steps(folder: Path, steps: list[Step]) -> None:
    """Run what is out of date, or everything if there is no ninja. The last step is the link."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    # The wheel of ninja puts it beside this Python, which need not be on PATH.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        run_without_ninja(steps)
        return
    text = [
        f"builddir = {folder}\n",
        "rule run\n  command = $cmd\n  depfile = $dep\n  deps = gcc\n",
    ]
    text += ["rule link\n  command = $cmd\n"]
    for step in steps:
        rule = "run" if step.depfile else "link"
        inputs = " ".join(map(escape_path, step.inputs))
        text.append(f"build {escape_path(step.output)}: {rule} {inputs}\n")
        text.append("  cmd = " + shlex.join(step.command).replace("$", "$$") + "\n")
        text.append(f"  dep = {step.depfile}\n" if step.depfile else "")
    manifest = folder / "build.ninja"
    manifest.write_text("".join(text))
    command = [ninja, "--quiet", "-f", str(manifest), "-j", str(max_jobs())]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SystemExit("pylora: the extension did not compile; the error is above")


def escape_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def run_without_ninja(steps: list[Step]) -> None:
    def run(step: Step) -> None:
        if subprocess.run(step.command, cwd=ROOT).returncode != 0:
            raise SystemExit(f"pylora: {step.output.name} did not compile; the error is above")

    with ThreadPoolExecutor(max_jobs()) as pool:
        list(pool.map(run, steps[:-1]))
    run(steps[-1])


def main() -> None:
    extensions, reason = extension_or_reason()
    if reason is not None:
        say(f"{reason}: installing without the extension; pylora will run on PyTorch alone")
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":  # pip's builds come here too
    main()
