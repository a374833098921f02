"""Row encoding, LoRA training and the miniature base model."""
