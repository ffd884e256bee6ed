"""Other methods that PEFT does not have, and what LoRA variants need before they are attached."""
