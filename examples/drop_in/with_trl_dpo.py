"""Preference training with TRL's DPOTrainer over a 4-bit model.

    python examples/drop_in/with_trl_dpo.py [--model ID] [--out FOLDER] [--steps N]

pylora takes one argument, which is marked. The trainer compares the model with its own base: it
disables the adapter for the reference, which needs no second copy of the weights.
"""

import argparse
from pydoc_data.topics import topics  # the reference of Python, which every Python carries

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from pylora.integrations.transformers import PyloraCallback

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--out", default="build/with_trl_dpo")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(
    options.model, quantization_config=quantization, dtype=torch.bfloat16
)
# Prefer the beginning of a text to the same words in reverse.
pairs = [
    {"prompt": f"{topic}: ", "chosen": text[:200], "rejected": " ".join(text[:200].split()[::-1])}
    for topic, text in topics.items()
]
pylora_callback = PyloraCallback()
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        options.out,
        max_length=128,
        per_device_train_batch_size=4,
        max_steps=options.steps,
        learning_rate=1e-4,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(pairs),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[pylora_callback],  # <- this argument
)
print(pylora_callback.report)
trainer.train()
trainer.save_model()
print(f"The adapter is in {options.out}; PEFT loads it.")
