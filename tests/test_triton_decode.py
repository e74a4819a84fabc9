"""The Triton NF4 decoder without a GPU: Python runs its PTX and checks its table and its code.

The interpreter takes the plain branch of the decoder. The instructions of the other branch are
executed here, over every word of codes that can tell two of them apart.
"""

from __future__ import annotations

import re

import pytest
import torch

from pylora.nf4 import NF4_CODE, nf4_code

decode = pytest.importorskip("pylora.kernels.nf4_decode")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run_ptx(text: str, word: int) -> list[int]:
    """Runs a decoder's PTX for one input word and returns the output registers."""
    outputs = len(set(re.findall(r"\$\d+", text))) - 1
    registers = {f"${outputs}": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for instruction in re.sub(r"[{}]", "", text).split(";"):
        opcode, _, operands = instruction.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        a, b, *rest = map(value, sources)
        if opcode == "and.b32":
            registers[target] = a & b
        elif opcode == "shr.u32":
            registers[target] = a >> b
        elif opcode == "lop3.b32":
            assert rest[1] == 0xEA  # the table of (a & b) | c
            registers[target] = a & b | rest[0]
        else:
            assert opcode == "prmt.b32"
            pool = (a | b << 32).to_bytes(8, "little")
            # A selector above 7 would copy a sign instead of a byte.
            chosen = [rest[0] >> 4 * i & 0xF for i in range(4)]
            assert max(chosen) < 8
            registers[target] = int.from_bytes(bytes(pool[i] for i in chosen), "little")
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_decode_every_code_in_every_place(dtype: torch.dtype) -> None:
    text = decode._decoder(dtype)
    factor = decode.BF16_FACTOR.value if dtype == torch.bfloat16 else 1.0
    table = (torch.tensor(NF4_CODE, dtype=torch.float64) * factor).to(dtype)
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(16, (8,), generator=generator).tolist() for _ in range(64)]
    words += [[(code + place) % 16 for place in range(8)] for code in range(16)]
    for codes in words:
        # Element 2j is in the high nibble of byte j.
        pairs = zip(codes[::2], codes[1::2], strict=True)
        packed = bytes(high << 4 | low for high, low in pairs)
        registers = run_ptx(text, int.from_bytes(packed, "little"))
        raw = b"".join(register.to_bytes(4, "little") for register in registers)
        values = torch.frombuffer(bytearray(raw), dtype=dtype)
        assert torch.equal(values, table[codes])


def test_fp32_and_fp16_tables_are_the_table_rounded_once() -> None:
    cpu = torch.device("cpu")
    for dtype, factor in ((torch.float32, 1.0), (torch.float16, 1.0)):
        planes = decode.code_planes(dtype)
        raw = [word.to_bytes(4, "little") for plane in planes for word in plane]
        table = torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.uint8)
        table = table.view(len(planes), 16).t().contiguous().view(dtype).view(-1)
        assert torch.equal(table, (nf4_code(cpu, torch.float64) * factor).to(dtype))


def test_bf16_factor_rounds_the_table_best() -> None:
    """The comment at the constant claims this. It is checked for a grid of factors in [1, 2)."""

    def error(factor: float) -> float:
        code = torch.tensor(NF4_CODE, dtype=torch.float64) * factor
        return float((code.bfloat16().double() - code).square().mean().sqrt()) / factor

    chosen = error(decode.BF16_FACTOR.value)
    assert abs(chosen - 3.2e-4) < 1e-5 and abs(error(1.0) - 5.5e-4) < 1e-5
    assert chosen <= min(error(1.0 + i / 2000) for i in range(2000))


def test_absmax_is_decoded_with_two_roundings() -> None:
    """The product and the sum of double quantization must not be fused into one FMA."""
    if decode.INTERPRETED.value:
        pytest.skip("the interpreter compiles nothing")
    from benchmarks.resources.triton import compile_variant
    from benchmarks.resources.triton_launches import launches

    variants = [v for v in launches(90) if v.kernel == "nf4_dequantize"]
    nested = [v for v in variants if "nested" in str(v)]
    assert nested
    for variant in nested:
        ptx = compile_variant(variant, 90).asm["ptx"]
        assert "mul.rn.f32" in ptx and "add" in ptx and "fma" not in ptx
