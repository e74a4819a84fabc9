"""QLoRA in a bare PyTorch loop, without PEFT and bitsandbytes.

    python examples/drop_in/with_torch.py [--model ID] [--out FOLDER] [--steps N]

transformers quantizes each weight while it reads the checkpoint, and LoRA is pylora's own.
"""

import argparse
import itertools
from pydoc_data.topics import topics  # the reference of Python, which every Python carries

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pylora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--out", default="build/with_torch")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(
    options.model, quantization_config=pylora.NF4Config(), dtype=torch.bfloat16
)
pylora.add_lora(model, r=16, lora_alpha=32)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

tokenizer = AutoTokenizer.from_pretrained(options.model)
model.train()
for step, text in enumerate(itertools.islice(itertools.cycle(topics.values()), options.steps)):
    ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}  loss {loss.item():.3f}")
pylora.save_adapter(model, options.out)
print(f"The adapter is in {options.out}; PEFT loads it.")
