"""Many LoRA adapters over one frozen base model: the library that training and serving share."""
