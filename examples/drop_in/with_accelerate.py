"""QLoRA in a loop of Accelerate, which runs on one device or many.

    accelerate launch examples/drop_in/with_accelerate.py [--model ID] [--out FOLDER] [--steps N]

pylora takes one line, which is marked. It comes before `prepare` wraps the model.
"""

import argparse
from pydoc_data.topics import topics  # the reference of Python, which every Python carries

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import pylora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--out", default="build/with_accelerate")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(
    options.model, quantization_config=quantization, dtype=torch.bfloat16
)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
report = pylora.accelerate(model)  # <- this line

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def collate(batch: list[str]) -> dict[str, torch.Tensor]:
    tokens = tokenizer(batch, truncation=True, max_length=128, padding=True, return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    return {**tokens, "labels": labels}


accelerator = Accelerator()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
texts = DataLoader(list(topics.values()), batch_size=4, shuffle=True, collate_fn=collate)
model, optimizer, texts = accelerator.prepare(model, optimizer, texts)
accelerator.print(report)

model.train()
step = 0
while step < options.steps:
    for batch in texts:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        accelerator.print(f"step {step}  loss {loss.item():.3f}")
        if step == options.steps:
            break
accelerator.unwrap_model(model).save_pretrained(
    options.out, is_main_process=accelerator.is_main_process
)
accelerator.print(f"The adapter is in {options.out}; PEFT loads it.")
