"""Preference training with trl: `DPOTrainer` with DiaBlo. The base, with the adapter off, is the reference model.

python -m examples.trl_dpo --model MODEL
"""

from __future__ import annotations

import re

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from diablo import DiabloConfig
from examples import rows


def preference(row: dict[str, str], number: int) -> dict[str, str]:
    """Prefer the right solution to one with another result. Rows of your own file may have `rejected`."""
    wrong = re.sub(r"-?\d+$", lambda result: str(int(result[0]) + 1 + number % 5), row["completion"])
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row.get("rejected", wrong)}


def main() -> None:
    parser = rows.parser(__doc__, "example_dpo")
    parser.set_defaults(rows=48, learning_rate=1e-3)
    options = rows.parse(parser)
    train, held_out = (
        Dataset.from_list([preference(row, number) for number, row in enumerate(texts)])
        for texts in rows.load(options.data, options.rows)
    )
    trainer = DPOTrainer(
        options.model,
        args=DPOConfig(
            str(options.out),
            model_init_kwargs={"dtype": "auto"},
            learning_rate=options.learning_rate,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            max_length=256,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),  # trl's default, True, needs a GPU
        ),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=DiabloConfig(num_blocks=options.num_blocks, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print(f"held-out loss {before['eval_loss']:.3f} before, {after['eval_loss']:.3f} after")
    print(f"the right solution is preferred in {after['eval_rewards/accuracies']:.0%} of the held-out rows")
    trainer.save_model()
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    rows.run(main)
