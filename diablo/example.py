"""DiaBlo in a plain `transformers.Trainer` script: `DiabloConfig` replaces `LoraConfig`. Runs on any machine.

python -m diablo.example OUT
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from diablo import DiabloConfig


def base_model() -> LlamaForCausalLM:
    """Return a small random model; in your script, call `AutoModelForCausalLM.from_pretrained(…)` instead."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def main(out: str) -> None:
    model = get_peft_model(base_model(), DiabloConfig(num_blocks=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    rows = [torch.arange(start, start + 16) % 64 for start in range(128)]  # sequences that count up
    dataset: list[dict[str, torch.Tensor]] = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(out, num_train_epochs=5, learning_rate=2e-2, logging_steps=16, save_strategy="no")
    Trainer(model=model, args=arguments, train_dataset=dataset).train()  # pyright: ignore[reportArgumentType]
    model.save_pretrained(out)
    merged = PeftModel.from_pretrained(base_model(), out).merge_and_unload()  # an ordinary LlamaForCausalLM
    next_token = merged(input_ids=torch.arange(10, 20)[None]).logits[0, -1].argmax().item()
    print(f"10 … 19 goes on with {next_token}")


if __name__ == "__main__":
    main(sys.argv[1])
