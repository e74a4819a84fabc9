"""Makes tests/data/adapterhub with the `adapters` library: adapters, and what models compute.

    pip install adapters==1.3.0 torch==2.13.0
    python tests/data/export_adapterhub.py

The library needs transformers 4.57, so it has an environment of its own. Each folder has an adapter
as `save_adapter` writes it; model.safetensors beside it is the model, and expected.safetensors the
logits for the tokens 3, 4, ... in two rows.
"""

from __future__ import annotations

from pathlib import Path

import adapters
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "adapterhub"
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
}
MODELS = {"bert": "BertForMaskedLM", "llama": "LlamaForCausalLM"}
CONFIGS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, ln_after=True),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
}

for name, kind in MODELS.items():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZES)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    adapters.init(model)
    for adapter, adapter_config in CONFIGS.items():
        model.add_adapter(adapter, config=adapter_config)
        for key, parameter in model.named_parameters():
            if f"adapters.{adapter}." in key:
                torch.nn.init.normal_(parameter, std=0.3)
        folder = FOLDER / name / adapter
        model.save_adapter(str(folder), adapter, use_safetensors=True, with_head=False)
        model.set_active_adapters(adapter)
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 19).view(2, 8)).logits
        save_file({"logits": logits}, folder / "expected.safetensors")
