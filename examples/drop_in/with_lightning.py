"""QLoRA with Lightning.

    python examples/drop_in/with_lightning.py [--model ID] [--out FOLDER] [--steps N]

pylora takes one line, which is marked.
"""

import argparse
from pydoc_data.topics import topics  # the reference of Python, which every Python carries

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import pylora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--out", default="build/with_lightning")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()


class QLoRA(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=quantization, dtype=torch.bfloat16
        )
        self.model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        self.model.train()  # transformers loads a model in eval mode, and Lightning keeps it
        print(pylora.accelerate(self.model))  # <- this line

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


tokenizer = AutoTokenizer.from_pretrained(options.model)
ids = [
    tokenizer(text, truncation=True, max_length=128, return_tensors="pt").input_ids[0]
    for text in topics.values()
]
module = QLoRA()
trainer = lightning.Trainer(
    max_steps=options.steps,
    accelerator="auto",
    devices=1,
    log_every_n_steps=1,
    default_root_dir=options.out,
    enable_checkpointing=False,  # only the adapter is worth a file
)
trainer.fit(module, DataLoader(ids, batch_size=1, shuffle=True))
module.model.save_pretrained(options.out)
print(f"The adapter is in {options.out}; PEFT loads it.")
