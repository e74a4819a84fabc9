"""The ways to train the same job: what is frozen, what is trained, in which precision.

Trained parameters are fp32 and every step runs under bf16 autocast, whatever the method, so that
the methods differ in what they train and not in how carefully they add it up.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _errors import UserError
from _files import replacing_folder
from torch import nn

import pylora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    title: str
    learning_rate: float
    nf4_base: bool
    adapter: bool = True


METHODS = {
    "qlora": Method("LoRA over an NF4 base", 1e-3, nf4_base=True),
    "lora": Method("LoRA over a bf16 base", 1e-3, nf4_base=False),
    "hybrid": Method("LoRA over an NF4 base, a few modules trained in full", 1e-3, nf4_base=True),
    "full": Method("every parameter, fp32 with bf16 autocast", 1e-4, nf4_base=False, adapter=False),
    "peft": Method("the same QLoRA through PEFT + bitsandbytes", 1e-3, nf4_base=True),
}


@dataclass(frozen=True)
class LoraOptions:
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    full_modules: tuple[str, ...] = ()  # hybrid: module names; empty: the last layer's MLP


def check_model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"--model {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {folder}: has no config.json, must be a transformers causal LM folder"
        )
    return folder


def model_fingerprint(folder: Path) -> str:
    """Names the model by its configuration and the sizes of its weight files, not by its path."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def count_parameters(folder: Path) -> int:
    """Counted on the meta device, from the configuration: a packed NF4 weight has fewer elements
    than it stands for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: its tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    folder: Path, dtype: torch.dtype, device: torch.device, **arguments: Any
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if device.type == "cpu":
        # torch's fused attention has a slow backward there: of sequences of 40 to 96 tokens, 16 at
        # a time, it took 4 to 7 times as long as two matmuls and a softmax (torch 2.13, AVX-512).
        arguments["attn_implementation"] = "eager"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **arguments)
        return model.to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: cannot be read as a causal LM: {error}") from error


def load_bitsandbytes_base(
    folder: Path, device: torch.device, skipped: tuple[str, ...]
) -> PreTrainedModel:
    """The NF4 base as bitsandbytes makes it: double quantization, blocks of 64, bf16 compute."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *skipped],
    )
    return load_base(folder, torch.bfloat16, device, quantization_config=config)


def trained_modules(model: nn.Module, method: str, lora: LoraOptions) -> tuple[str, ...]:
    """The names of the modules that the hybrid method trains in full."""
    if method != "hybrid":
        return ()
    names = dict(model.named_modules())
    for name in lora.full_modules:
        if name not in names:
            near = [known for known in names if known.endswith(name)][:3]
            raise UserError(
                f"--full-modules {name}: the model has no such module"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    return lora.full_modules or (_last_mlp(names),)


def _last_mlp(modules: dict[str, nn.Module]) -> str:
    stacks = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList)}
    if not stacks:
        raise UserError("--method hybrid: name the modules to train with --full-modules")
    stack = max(stacks, key=lambda name: len(stacks[name]))
    last = f"{stack}.{len(stacks[stack]) - 1}"
    return f"{last}.mlp" if f"{last}.mlp" in modules else last


def build(folder: Path, method: str, lora: LoraOptions, device: torch.device) -> nn.Module:
    """The model of `folder`, ready to be trained by `method`."""
    if method == "peft":
        model: nn.Module = _build_peft(folder, lora, device)
    elif method == "full":
        model = load_base(folder, torch.float32, device)
    else:
        model = load_base(folder, torch.bfloat16, device)
        kept = trained_modules(model, method, lora)
        if METHODS[method].nf4_base:
            pylora.quantize_model(model, skip_modules=("lm_head", *kept), double_quant=True)
        pylora.add_lora(
            model,
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear",
            modules_to_save=kept,
        )
    for _, parameter in trainable(model):
        parameter.data = parameter.data.float()
    model.config.use_cache = False
    return model


def _build_peft(folder: Path, lora: LoraOptions, device: torch.device) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base = load_bitsandbytes_base(folder, device, ())
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are not trained, with the statistics that NF4 keeps beside them."""
    return sum(tensor.nbytes for tensor in _frozen_tensors(model))


def _frozen_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)  # bitsandbytes holds it on the parameter
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax


def chosen_kernels(model: nn.Module) -> str:
    """What dispatch takes for the model's LoRA layers; empty where there are none of ours."""
    for layer in model.modules():
        if isinstance(layer, pylora.nn.LoRALinear):
            weight = layer.base_weight
            x = torch.zeros(16, layer.in_features, dtype=torch.bfloat16, device=layer.lora_A.device)
            choice = pylora.explain(
                "lora_linear", x, weight, layer.lora_A, layer.lora_B, layer.scaling
            )
            return f"{choice.backend} ({choice.compiled_for})"
    return ""


def save_trained(model: nn.Module, method: str, out: Path) -> Path:
    """What the training was for, in a folder of its own: an adapter in PEFT's format, or, after
    full fine-tuning, the whole model in bf16."""
    if method == "full":
        target = out / "model"
        with replacing_folder(target) as temporary:
            weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
            model.config.dtype = torch.bfloat16
            model.save_pretrained(temporary, state_dict=weights)
        return target
    target = out / "adapter"
    with replacing_folder(target) as temporary:
        if method == "peft":
            model.save_pretrained(temporary)
        else:
            pylora.save_adapter(model, temporary)
    return target


def quiet_libraries() -> None:
    """Nothing is looked up on a network, and the libraries' own progress bars stay out of ours."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes' CPU backend reports an optional kernel from a hub that it could not fetch.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks transformers under a name that is about to change.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
