"""Several DiaBlo adapters on one base: train two, switch, mix them in one batch, and add them.

python -m examples.several_adapters --model MODEL
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from diablo import DiabloConfig
from examples import rows
from examples.trainer import padded, tokenized


def main() -> None:
    parser = rows.parser(__doc__, "example_adapters")
    parser.set_defaults(rows=80)
    options = rows.parse(parser)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, held_out = rows.load(options.data, options.rows)
    # "steps" learns whole solutions, "result" only their last line.
    tasks = {
        "steps": train,
        "result": [{**row, "completion": row["completion"].splitlines()[-1]} for row in train],
    }

    def config() -> DiabloConfig:
        return DiabloConfig(num_blocks=options.num_blocks, task_type="CAUSAL_LM")

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model: Any = get_peft_model(base, config(), adapter_name="steps")
    model.add_adapter("result", config())
    for name, texts in tasks.items():
        model.set_adapter(name)  # only this one is trained
        arguments = TrainingArguments(
            str(options.out),
            num_train_epochs=1,
            learning_rate=options.learning_rate,
            logging_steps=8,
            save_strategy="no",
            report_to="none",
        )
        Trainer(model, arguments, data_collator=padded, train_dataset=tokenized(tokenizer, texts)).train()  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(options.out))  # a folder for each adapter
    model.eval()

    def answer(prompts: list[str], **further: Any) -> list[str]:
        ids = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            made = model.generate(
                **ids, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id, **further
            )
        return tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    prompt = held_out[0]["prompt"]
    print(prompt)
    names = ["steps", "result", "__base__"]
    for name, text in zip(names, answer([prompt] * 3, adapter_names=names), strict=True):  # one batch
        print(f"[{name}]\n{text}")
    model.base_model.add_weighted_adapter(["steps", "result"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    print(f"[mean of both]\n{answer([prompt])[0]}")
    with model.disable_adapter():
        print(f"[no adapter]\n{answer([prompt])[0]}")


if __name__ == "__main__":
    rows.run(main)
