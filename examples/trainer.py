"""DiaBlo in a plain `transformers.Trainer` script: `DiabloConfig` replaces `LoraConfig`.

python -m examples.trainer                       # a small random model learns to count: seconds, no download
python -m examples.trainer --model MODEL         # word problems, or --data FILE
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from diablo import DiabloConfig
from examples import rows


def base_model(name: str | None) -> Any:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def tokenized(tokenizer: Any, texts: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """Return ids of prompt and completion; the loss is on the completion, -100 masks the prompt."""
    examples: list[dict[str, list[int]]] = []
    for text in texts:
        prompt = tokenizer(text["prompt"])["input_ids"]
        target = [*tokenizer(text["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})
    return examples


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def pad(name: str, value: int) -> torch.Tensor:
        tensors = [torch.tensor(example[name]) for example in batch]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    labels = pad("labels", -100)
    lengths = torch.tensor([len(example["input_ids"]) for example in batch])
    return {
        "input_ids": pad("input_ids", 0),
        "attention_mask": (torch.arange(labels.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
    }


def main() -> None:
    parser = rows.parser(__doc__, "example_trainer")
    parser.set_defaults(model=None)
    options = rows.parse(parser)
    tokenizer = None
    if options.model is None:
        defaults = {name: parser.get_default(name) for name in ("data", "rows", "num_blocks", "learning_rate")}
        if ignored := [name for name, value in defaults.items() if getattr(options, name) != value]:
            parser.error(f"--{ignored[0].replace('_', '-')} needs --model: without one, a small model learns to count")
        model, num_blocks, epochs, learning_rate = base_model(None), 4, 5, 2e-2
        sequences = [[number % 64 for number in range(start, start + 16)] for start in range(144)]
        counting = [{"input_ids": ids, "labels": ids} for ids in sequences]
        train, held_out = counting[:128], counting[128:]
    else:
        model = base_model(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        num_blocks, epochs, learning_rate = options.num_blocks, 1, options.learning_rate
        train, held_out = (tokenized(tokenizer, texts) for texts in rows.load(options.data, options.rows))

    config = DiabloConfig(num_blocks=num_blocks, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        str(options.out),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, data_collator=padded, train_dataset=train, eval_dataset=held_out)  # pyright: ignore[reportArgumentType]
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    model.save_pretrained(str(options.out))  # adapter_config.json, adapter_model.safetensors and a model card

    # Load it on a fresh base and merge: an ordinary model again, as fast as before.
    merged: Any = PeftModel.from_pretrained(base_model(options.model), str(options.out)).merge_and_unload()
    if tokenizer is None:
        next_token = merged(input_ids=torch.arange(10, 20)[None]).logits[0, -1].argmax().item()
        print(f"10 … 19 goes on with {next_token}")
    else:
        prompt = rows.load(options.data, options.rows)[1][0]["prompt"]
        ids = tokenizer(prompt, return_tensors="pt")
        answer = merged.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
        print(prompt + tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    rows.run(main)
