"""QLoRA with TRL's SFTTrainer, which builds the model itself.

    python examples/drop_in/with_trl_sft.py [--model ID] [--out FOLDER] [--steps N]

pylora takes one line, which is marked. It comes before the trainer is made.
"""

import argparse
from pydoc_data.topics import topics  # the reference of Python, which every Python carries

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import pylora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--out", default="build/with_trl_sft")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

print(pylora.patch())  # <- this line

quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
trainer = SFTTrainer(
    options.model,
    args=SFTConfig(
        options.out,
        model_init_kwargs={"quantization_config": quantization, "dtype": "bfloat16"},
        max_length=128,
        max_steps=options.steps,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list([{"text": text} for text in topics.values()]),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
print(f"The adapter is in {options.out}; PEFT loads it.")
