"""DiaBlo on a 4-bit base: bitsandbytes' NF4, or `diablo.quantize`'s packed weights, which need no other package.

python -m examples.quantized_base --model MODEL --base packed
python -m examples.quantized_base --model MODEL --base bitsandbytes     # after: pip install bitsandbytes
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from diablo import DiabloConfig
from diablo.quantize import QuantizationSettings, load_quantized, merge_dequantized, quantize_model
from examples import rows
from examples.trainer import padded, tokenized


def load_base(model: str, kind: str, folder: Path, group_size: int) -> Any:
    if kind == "bitsandbytes":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return AutoModelForCausalLM.from_pretrained(model, quantization_config=settings)
    if not folder.exists():  # quantise once; `--base packed` finds the folder again
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        quantize_model(base, QuantizationSettings("nf", bits=4, group_size=group_size), folder)
    return load_quantized(folder)


def main() -> None:
    parser = rows.parser(__doc__, "example_quantized")
    parser.add_argument("--base", choices=["packed", "bitsandbytes"], default="packed", help="default: %(default)s")
    parser.add_argument(
        "--group-size", type=int, default=64, help="weights that share a scale, for packed; default: %(default)s"
    )
    parser.set_defaults(rows=80)
    options = rows.parse(parser)
    if options.base == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--base bitsandbytes: not installed: pip install bitsandbytes")
    folder = options.out / "base"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, held_out = (tokenized(tokenizer, texts) for texts in rows.load(options.data, options.rows))
    # The base is quantised, so the blocks act from the side (mode "adapter"); they are trained in float32.
    config = DiabloConfig(num_blocks=options.num_blocks, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(options.model, options.base, folder, options.group_size), config)
    print(f"{options.base} base: {model.get_memory_footprint() / 1e6:.0f} MB with the adapter")
    arguments = TrainingArguments(
        str(options.out),
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, data_collator=padded, train_dataset=train, eval_dataset=held_out)  # pyright: ignore[reportArgumentType]
    # No evaluation before training: on some CPUs bitsandbytes then repacks the weights, and gradients are lost.
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    with model.disable_adapter():
        before = trainer.evaluate()["eval_loss"]
    print(f"held-out loss {before:.3f} before, {after:.3f} after")
    adapter = options.out / "adapter"
    model.save_pretrained(str(adapter))

    # The adapter belongs to this quantised base. On packed weights it can be merged into their dequantised values.
    model = PeftModel.from_pretrained(load_base(options.model, options.base, folder, options.group_size), str(adapter))
    if options.base == "packed":
        merged = merge_dequantized(model)
        merged.save_pretrained(str(options.out / "merged"))
    print(f"adapter: {adapter}")


if __name__ == "__main__":
    rows.run(main)
