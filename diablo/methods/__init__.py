"""Methods that PEFT lacks, and the preparation that some LoRA variants need before they are attached."""
