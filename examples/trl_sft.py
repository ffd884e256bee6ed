"""Supervised fine-tuning with trl: `SFTTrainer` takes a `DiabloConfig` as its `peft_config`.

python -m examples.trl_sft --model MODEL
"""

from __future__ import annotations

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from diablo import DiabloConfig
from examples import rows


def main() -> None:
    options = rows.parse(rows.parser(__doc__, "example_sft"))
    train, held_out = (Dataset.from_list(texts) for texts in rows.load(options.data, options.rows))
    trainer = SFTTrainer(
        options.model,
        args=SFTConfig(
            str(options.out),
            model_init_kwargs={"dtype": "auto"},
            learning_rate=options.learning_rate,
            num_train_epochs=1,
            max_length=256,
            logging_steps=8,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),  # trl's default, True, needs a GPU
        ),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=DiabloConfig(num_blocks=options.num_blocks, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    trainer.save_model()
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    rows.run(main)
