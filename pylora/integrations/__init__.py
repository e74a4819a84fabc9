"""What knows PEFT, bitsandbytes and transformers; none of them needs to be installed."""
