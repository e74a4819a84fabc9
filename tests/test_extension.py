"""pylora._C: how it was built, how it picks an instruction set, and its NF4 ops bit for bit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pylora
from pylora import nf4
from pylora.backends import extension
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.normalization import NORMS

_C = pytest.importorskip("pylora._C", reason="pylora was installed without its extension")
bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is the oracle here")

ops = torch.ops.pylora_C
ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx_emulated", "amx"]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALLEST_NORMAL = 2.0**-126


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in _C.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def bits(x: Tensor) -> Tensor:
    """Returns the bits as integers, which tell -0 from 0 and make a NaN equal to itself."""
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(bits(got), bits(expected))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# The build


def test_build_info_agrees_with_the_package():
    info = _C.build_info()
    assert info["version"] == pylora.__version__
    assert info["torch_target"] == "2.10"
    assert info["compiler"].startswith(("gcc", "clang"))
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["cuda_version"] is not None)


def cuobjdump(*options: str) -> str:
    if not _C.build_info()["cuda"]:
        pytest.skip("built without CUDA")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton came without cuobjdump")
    command = [tool, *options, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_holds_code_for_each_gpu_architecture():
    binaries, ptx = cuobjdump("--list-elf"), cuobjdump("--list-ptx")
    for arch in _C.build_info()["cuda_archs"]:
        assert f".sm_{arch.removesuffix('+PTX')}.cubin" in binaries
        if arch.endswith("+PTX"):
            assert f".sm_{arch.removesuffix('+PTX')}.ptx" in ptx


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_gpu_code_moves_16_bytes_at_a_time_and_does_not_spill(arch: str):
    if arch not in [built.removesuffix("+PTX") for built in _C.build_info()["cuda_archs"]]:
        pytest.skip(f"built without sm_{arch}")
    kernels = cuobjdump("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]
    assert not [kernel.split()[0] for kernel in kernels if "STL" in kernel or "LDL" in kernel]
    forward = [kernel for kernel in kernels if "lora_linear_small_m" in kernel.split()[0]]
    backward = [kernel for kernel in kernels if "nf4_linear_backward_small_m" in kernel.split()[0]]
    # fp16 and bf16 for six counts of token tiles. Two counts also have a kernel for blocks of 32.
    assert len(forward) == 16 and len(backward) == 12
    for kernel in forward + backward:
        copies = set(re.findall(r"LDGSTS\S*", kernel))
        assert copies and all(copy.endswith(".128") for copy in copies)
        assert "HMMA.16816.F32" in kernel
    assert all("LDSM" in kernel for kernel in forward)
    for kernel in backward:
        assert "HMUL2" in kernel or "HFMA2" in kernel
        assert set(re.findall(r"STG\S*", kernel)) >= {"STG.E.128"}
    tiles = [k for k in kernels if re.search("nf4_(de)?quantize_tiles", k.split()[0])]
    assert len(tiles) == 3 * len(DTYPES)  # dequantize also has kernels for rows with gaps
    for kernel in tiles:
        loads, stores = set(re.findall(r"LDG\S*", kernel)), set(re.findall(r"STG\S*", kernel))
        assert any("128" in load for load in loads)
        # quantize also stores an absmax beside its 16 bytes of codes.
        assert stores - {"STG.E"} == {"STG.E.128"}
        assert "STG.E" not in stores or "nf4_quantize" in kernel.split()[0]


def test_hopper_code_waits_once_for_four_products():
    """W comes from registers, and ptxas did not make each product wait for the last."""
    if "90a" not in _C.build_info()["cuda_archs"]:
        pytest.skip("built without sm_90a")
    kernels = cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")[1:]
    kernels = [kernel for kernel in kernels if "lora_linear_hopper" in kernel.split()[0]]
    assert len(kernels) == 4  # fp16 and bf16, tiles of 128 and 256 tokens
    for kernel in kernels:
        products = re.findall(r"HGMMA\.64x\d+x\d+\.F32\S* (.*?);", kernel)
        assert all(re.match(r"R\d+, R\d+, gdesc\[UR\d+\], R\d+", product) for product in products)
        assert len(products) == 4 * sum("gsb0" in product for product in products) == 16
        assert "UTMALDG.2D" in kernel and "USETMAXREG" in kernel and "STG.E.128" in kernel
        assert "STSM.16.MT88.4" in kernel and "LDS.128" in kernel


def test_loads_without_a_gpu_or_a_cuda_library():
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    command = ["readelf", "--dynamic", _C.__file__]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = [line for line in output.splitlines() if "NEEDED" in line]
    assert any("libtorch_cpu" in line for line in needed)
    assert not any("cuda" in line for line in needed)


@pytest.mark.parametrize(
    "op",
    "nf4_quantize nf4_dequantize nf4_linear nf4_linear_backward "
    "lora_linear lora_linear_backward bottleneck_adapter_backward".split(),
)
def test_a_compiled_op_takes_the_arguments_of_the_public_op(op: str):
    public = str(getattr(torch.ops.pylora, op).default._schema).replace("SymInt", "int")
    # The compiled ops take only NF4 weights, and activations and norms by their numbers.
    public = public.replace("Tensor weight, Tensor? absmax", "Tensor qweight, Tensor absmax")
    public = re.sub(r"str (?=activation|norm_)", "int ", public)
    compiled = str(getattr(ops, op).default._schema).replace("pylora_C::", "pylora::")
    assert compiled.split(" -> ")[0] == public.split(" -> ")[0]


def test_activations_have_the_numbers_of_the_c_enum():
    assert list(extension.ACTIVATION_CODES) == _C.build_info()["activations"]
    assert list(extension.ACTIVATION_CODES.values()) == list(range(len(ACTIVATIONS)))
    assert set(extension.ACTIVATION_CODES) == set(ACTIVATIONS)


def test_norms_have_the_numbers_of_the_c_enum():
    assert list(extension.NORM_CODES) == _C.build_info()["norms"]
    assert list(extension.NORM_CODES.values()) == list(range(len(NORMS) + 1))
    assert set(extension.NORM_CODES) == {"none", *NORMS}


# The instruction set


def test_the_fastest_instruction_set_is_used():
    runnable = _C.cpu_isas()
    assert runnable == [isa for isa in ISAS if isa in runnable] and runnable[0] == "portable"
    assert ("amx_emulated" in runnable) == ("avx512_bf16" in runnable)
    runnable = [isa for isa in runnable if isa != "amx_emulated"]
    code = "import pylora._C as C; print(C.cpu_isa())"
    assert run_python(code, PYLORA_CPU_ISA="").stdout.split() == runnable[-1:]


def test_features_support_the_instruction_sets():
    features, runnable = set(_C.cpu_features()), _C.cpu_isas()
    assert ("avx2" in runnable) == ({"avx2", "fma", "f16c"} <= features)
    if "avx512" in runnable:
        assert {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= features
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return
    flags = set(cpuinfo.read_text().split())
    assert not {name for name in features if name.startswith("avx2") or name == "fma"} - flags


def test_the_environment_forces_an_instruction_set():
    code = "import pylora._C as C; print(C.cpu_isa())"
    assert run_python(code, PYLORA_CPU_ISA="portable").stdout.split() == ["portable"]


def test_an_unknown_instruction_set_is_an_error():
    code = "import pylora._C as C; C.cpu_isa()"
    stderr = run_python(code, PYLORA_CPU_ISA="sse9").stderr
    assert 'RuntimeError: PYLORA_CPU_ISA is "sse9"' in stderr and "portable" in stderr
    with pytest.raises(RuntimeError, match=r'name is "sse9", .*must be one of portable'):
        _C.set_cpu_isa("sse9")


def test_an_instruction_set_that_cannot_run_is_an_error():
    missing = [isa for isa in ISAS if isa not in _C.cpu_isas()]
    if not missing:
        pytest.skip("this processor has them all")
    code = "import pylora._C as C; C.cpu_isa()"
    stderr = run_python(code, PYLORA_CPU_ISA=missing[0]).stderr
    assert f'RuntimeError: PYLORA_CPU_ISA is "{missing[0]}"' in stderr and "cannot run" in stderr


# nf4_quantize


def adversarial(numel: int, blocksize: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns weights that reveal a shortcut in the scaling or the rounding."""
    code = nf4.nf4_code(torch.device("cpu"), torch.float32)
    midpoints = (code[1:] + code[:-1]) / 2
    ties = midpoints[torch.randint(15, (numel,))]
    above, below = (torch.nextafter(ties, torch.tensor(x)) for x in (2.0, -2.0))
    around = torch.stack([below, ties, above])[torch.randint(3, (numel,)), torch.arange(numel)]
    ties[::blocksize] = around[::blocksize] = 1.0  # absmax is 1; the factors below scale it
    scattered = torch.randn(numel)
    scattered[torch.rand(numel) < 0.5] = 0.0
    scattered[: numel // 2] = 0.0
    weights = {
        "normal": torch.randn(numel),
        "ties": ties * 2.0 ** float(torch.randint(-14, 14, ())),
        "scaled ties": around * (1 + torch.rand(())),
        "huge range": torch.randn(numel) * torch.exp2(torch.randint(-140, 120, (numel,))),
        "denormal": torch.randn(numel) * torch.exp2(torch.randint(-149, -120, (numel,))),
        "tiny blocks": torch.full((numel,), 1e-39),
        "zero blocks": scattered,
    }
    return {
        name: torch.nan_to_num(x.to(dtype), posinf=1.0, neginf=-1.0) for name, x in weights.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_equals_bitsandbytes_bit_for_bit(isa: str, blocksize: int, dtype: torch.dtype):
    for numel in (4 * blocksize, 2 * blocksize + 1, 3 * blocksize - 7, blocksize // 2 - 2, 1):
        for name, weight in adversarial(numel, blocksize, dtype).items():
            expected, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
            qweight, absmax = ops.nf4_quantize(weight, blocksize)
            wrong = f"{name}, {numel} elements"
            assert torch.equal(qweight, expected.view(-1)), wrong
            assert torch.equal(bits(absmax), bits(state.absmax)), wrong


def test_quantize_does_not_depend_on_threads(isa: str):
    weight = torch.randn(301, 4097)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.nf4_quantize(weight, 64))
    torch.set_num_threads(before)
    for qweight, absmax in results[1:]:
        assert torch.equal(qweight, results[0][0]) and torch.equal(absmax, results[0][1])


def test_quantize_takes_unaligned_memory(isa: str):
    for dtype in DTYPES:
        weight = torch.randn(1 + 5 * 64).to(dtype)[1:]
        expected = ops.nf4_quantize(weight.clone(), 64)
        assert all(map(torch.equal, ops.nf4_quantize(weight, 64), expected))


def test_quantize_takes_strides():
    weight = torch.randn(96, 128)
    for strided in (weight.t(), weight[:, ::2], weight[:1].expand(3, -1)):
        expected = ops.nf4_quantize(strided.contiguous(), 64)
        assert all(map(torch.equal, ops.nf4_quantize(strided, 64), expected))


def test_quantize_gives_empty_results_for_an_empty_weight():
    qweight, absmax = ops.nf4_quantize(torch.empty(0, 64), 64)
    assert qweight.shape == absmax.shape == (0,)
    assert (qweight.dtype, absmax.dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        (torch.zeros(64, dtype=torch.float64), 64, "weight must be float32, .* got Double"),
        (torch.zeros(64), 48, "blocksize must be 32, .* or 4096, got 48"),
        (torch.zeros(64), 8192, "blocksize must be 32, .* or 4096, got 8192"),
        (torch.zeros(64), 0, "blocksize must be 32, .* or 4096, got 0"),
        (torch.zeros(64), -64, "blocksize must be 32, .* or 4096, got -64"),
    ],
)
def test_quantize_names_a_wrong_argument(weight: Tensor, blocksize: int, message: str):
    with pytest.raises(RuntimeError, match=message):
        ops.nf4_quantize(weight, blocksize)


# nf4_dequantize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_equals_bitsandbytes_bit_for_bit(isa: str, blocksize: int, dtype: torch.dtype):
    for shape in ((4, blocksize), (3, blocksize + 22), (1, 30)):
        weight = torch.randn(shape)
        qweight, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
        absmax = state.absmax
        got = ops.nf4_dequantize(qweight, absmax, None, None, None, blocksize, 256, shape, dtype)
        with torch.compiler.set_stance(
            "force_eager"
        ):  # bitsandbytes would use torch.compile for large blocks
            expected = torch.ops.bitsandbytes.dequantize_4bit(
                qweight, absmax, blocksize, "nf4", shape, dtype
            )
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_decodes_a_nested_absmax(isa: str, dtype: torch.dtype):
    weight = torch.randn(96, 520)  # 780 blocks: three whole nested blocks and a short one
    qweight, state = bnb.quantize_4bit(
        weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    nested = state.state2
    got = ops.nf4_dequantize(
        qweight, state.absmax, nested.absmax, nested.code, state.offset, 64, 256, (96, 520), dtype
    )
    assert_same_bits(got, bnb.dequantize_4bit(qweight, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_ties_and_denormals(isa: str, dtype: torch.dtype):
    """bitsandbytes flushes bf16 denormals on some processors. The rule is to round once."""
    every_code = torch.arange(
        256, dtype=torch.uint8
    )  # each block has every code in its low nibbles
    ties = [
        1 + odd * 2.0**-power for power in (8, 11) for odd in (1, 3)
    ]  # ties of bf16 and of fp16
    denormal = [1e-45, 1e-39, 1.5e-38, 6e-8, 3 * 2.0**-25, 3e-5]
    absmax = torch.tensor([*ties, *denormal, 0.0, 1.0, 65504.0, 65519.0, 65520.0, 3e38])
    got = ops.nf4_dequantize(every_code, absmax, None, None, None, 32, 256, (512,), dtype)
    codes = torch.stack([every_code >> 4, every_code & 15], dim=1).view(16, 32).long()
    code = nf4.nf4_code(torch.device("cpu"), torch.float32)
    assert_same_bits(got, (code[codes] * absmax[:, None]).view(-1).to(dtype))
    assert dtype == torch.float16 or (got.abs().float() < SMALLEST_NORMAL).any()


def test_dequantize_takes_odd_counts_and_unaligned_bytes(isa: str):
    for numel in (1, 33, 64 * 5 + 1, 64 * 3 - 1):
        qweight, absmax = ops.nf4_quantize(torch.randn(numel), 64)
        moved = torch.cat([qweight[:1], qweight])[1:]
        for dtype in DTYPES:
            expected = ops.nf4_dequantize(
                qweight, absmax, None, None, None, 64, 0, (numel,), torch.float32
            ).to(dtype)
            got = ops.nf4_dequantize(moved, absmax, None, None, None, 64, 0, (numel,), dtype)
            assert_same_bits(got, expected)


def test_dequantize_takes_strides():
    q = pylora.quantize_nf4(torch.randn(96, 520), double_quant=True).op_arguments()
    expected = ops.nf4_dequantize(*q, (96, 520), torch.float32)
    strided = [torch.stack([t, t], -1)[..., 0] if isinstance(t, Tensor) else t for t in q]
    assert not any(t.is_contiguous() for t in strided if isinstance(t, Tensor) and t.numel() > 1)
    assert torch.equal(ops.nf4_dequantize(*strided, (96, 520), torch.float32), expected)


def test_dequantize_gives_an_empty_result_for_an_empty_weight():
    nothing = torch.empty(0, dtype=torch.uint8)
    arguments = (nothing, torch.empty(0), None, None, None, 64, 256)
    got = ops.nf4_dequantize(*arguments, (0, 7), torch.bfloat16)
    assert got.shape == (0, 7) and got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.int8}, "dtype must be float32, float16 or bfloat16, got Char"),
        ({"shape": (4, 65)}, "qweight must have 130 elements .*, got 128"),
        ({"shape": (-4, -64)}, r"shape must have no negative size, got \[-4, -64\]"),
        ({"shape": (2**40, 2**40)}, "shape must have fewer than 2\\^60 elements"),
        ({"blocksize": 33}, "blocksize must be 32, .*, got 33"),
        ({"blocksize": 128}, "absmax must have 2 elements .*, got 4"),
        ({"qweight": torch.zeros(128)}, "qweight must have dtype Byte, got Float"),
        ({"absmax": torch.zeros(4).half()}, "absmax must have dtype Float, got Half"),
        ({"nested_absmax": torch.ones(1)}, "must be given together .* no nested_code and no off"),
        ({"nested": True, "absmax": torch.zeros(4)}, "absmax must have dtype Byte, got Float"),
        ({"nested": True, "nested_blocksize": 2}, "nested_absmax must have 2 elements"),
        ({"nested": True, "nested_blocksize": 0}, "nested_blocksize must be positive, got 0"),
        ({"nested": True, "nested_code": torch.ones(16)}, "nested_code must have 256 elements"),
        ({"nested": True, "offset": torch.ones(2)}, "offset must have 1 elements"),
        ({"nested": True, "offset": torch.ones((), dtype=torch.float64)}, "offset must have dtype"),
    ],
)
def test_dequantize_names_a_wrong_argument(change: dict, message: str):
    change = dict(change)
    nested = change.pop("nested", False)
    arguments = {
        "qweight": torch.zeros(128, dtype=torch.uint8),
        "absmax": torch.zeros(4, dtype=torch.uint8) if nested else torch.zeros(4),
        "nested_absmax": torch.ones(1) if nested else None,
        "nested_code": torch.ones(256) if nested else None,
        "offset": torch.ones(()) if nested else None,
        "blocksize": 64,
        "nested_blocksize": 256,
        "shape": (4, 64),
        "dtype": torch.float32,
    }
    ops.nf4_dequantize(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        ops.nf4_dequantize(*(arguments | change).values())
