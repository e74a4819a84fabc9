"""QLoRA with transformers' Trainer, PEFT and bitsandbytes.

    python examples/drop_in/with_trainer.py [--model ID] [--out FOLDER] [--steps N]

pylora takes one line, which is marked.
"""

import argparse
from pydoc_data.topics import topics  # the reference of Python, which every Python carries

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import pylora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--out", default="build/with_trainer")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    options.model, quantization_config=quantization, dtype=torch.bfloat16
)
lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora)
print(pylora.accelerate(model))  # <- this line

tokenizer = AutoTokenizer.from_pretrained(options.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
texts = [tokenizer(text, truncation=True, max_length=128) for text in topics.values()]
trainer = Trainer(
    model,
    TrainingArguments(options.out, max_steps=options.steps, learning_rate=1e-3, logging_steps=1),
    train_dataset=texts,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.save_model()
print(f"The adapter is in {options.out}; PEFT loads it.")
