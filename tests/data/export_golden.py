"""Writes golden.safetensors beside it from the installed bitsandbytes and PEFT.

Run once, with the versions named in the file's metadata; the tests read the file and never write
it.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

SHAPES = {"aligned": (24, 128), "straddling": (10, 84), "odd": (7, 13)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def nf4_vectors() -> dict[str, torch.Tensor]:
    """Makes weights with an outlier and a block of zeros, and quantizes them with bitsandbytes."""
    entries = {}
    for shape_name, shape in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            weight = torch.randn(shape)
            weight.view(-1)[3] = 40.0
            weight.view(-1)[32:64] = 0.0
            weight = weight.to(dtype)
            for double_quant in (False, True):
                packed, state = bnb.quantize_4bit(
                    weight, blocksize=32, quant_type="nf4", compress_statistics=double_quant
                )
                prefix = f"nf4.{shape_name}.{dtype_name}.{'nested' if double_quant else 'plain'}."
                entries[prefix + "weight"] = weight
                entries[prefix + "packed"] = packed.view(-1)
                entries[prefix + "absmax"] = state.absmax
                if double_quant:
                    entries[prefix + "nested_absmax"] = state.state2.absmax
                    entries[prefix + "offset"] = state.offset
                if shape[1] % 32 == 0:
                    entries[prefix + "dequantized"] = bnb.dequantize_4bit(packed, state)
    return entries


def lora_vectors() -> dict[str, torch.Tensor]:
    """PEFT's LoRA layer in float64: inputs, parameters, output and every gradient."""
    entries = {}
    for name, options in {
        "plain": {},
        "rslora": {"use_rslora": True},
        "bias": {"lora_bias": True},
    }.items():
        torch.manual_seed(7)
        config = LoraConfig(r=5, lora_alpha=12, target_modules=["0"], lora_dropout=0.0, **options)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(30, 20)), config).double()
        layer = model.base_model.model[0]
        lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
        torch.nn.init.normal_(lora_B.weight)
        if lora_B.bias is not None:
            torch.nn.init.normal_(lora_B.bias)
        x = torch.randn(2, 4, 30, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(2, 4, 20, dtype=torch.float64)
        y = layer(x)
        y.backward(grad)
        tensors = {
            "x": x,
            "grad": grad,
            "weight": layer.base_layer.weight,
            "bias": layer.base_layer.bias,
            "lora_A": lora_A.weight,
            "lora_B": lora_B.weight,
            "scaling": torch.tensor(layer.scaling["default"], dtype=torch.float64),
            "y": y,
            "dx": x.grad,
            "dlora_A": lora_A.weight.grad,
            "dlora_B": lora_B.weight.grad,
        }
        if lora_B.bias is not None:
            tensors |= {"lora_B_bias": lora_B.bias, "dlora_B_bias": lora_B.bias.grad}
        entries |= {f"lora.{name}.{key}": value.detach() for key, value in tensors.items()}
    return entries


def main() -> None:
    torch.manual_seed(1)
    entries = {k: v.contiguous().clone() for k, v in (nf4_vectors() | lora_vectors()).items()}
    metadata = {name: version(name) for name in ("torch", "bitsandbytes", "peft")}
    path = Path(__file__).with_name("golden.safetensors")
    save_file(entries, path, metadata)
    print(f"{path}: {len(entries)} tensors, {path.stat().st_size} bytes, {metadata}")


if __name__ == "__main__":
    main()
