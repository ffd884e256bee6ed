"""Rules for fields of a config's open mappings, by dotted name.

These are the fields of transformers' and PEFT's config classes, of `method.prepare` and of `quantization.options`; each
class checks its own fields too, but only when it is made.
"""

from __future__ import annotations

from dataclasses import replace

from experiments.rules import FLAG, Rule

PATTERNS = (
    *("diagonal", "random_block", "permuted_block", "shuffled_diagonal"),
    *("random_row", "random_column", "random_entry", "banded"),
)
COUNT, SHARE, DROPOUT = Rule("whole", 1), Rule("number", 0, 1), Rule("number", 0, 1, below=True)
ALPHA = Rule("number", 0, above=True)
OPEN = {
    "model.architecture.model_type": Rule("text"),
    "model.architecture.vocab_size": COUNT,
    "model.architecture.hidden_size": COUNT,
    "model.architecture.intermediate_size": replace(COUNT, many="or list"),
    "model.architecture.num_hidden_layers": COUNT,
    "model.architecture.num_attention_heads": COUNT,
    "model.architecture.num_key_value_heads": replace(COUNT, null=True),
    "model.architecture.head_dim": replace(COUNT, null=True),
    "model.architecture.max_position_embeddings": COUNT,
    "model.architecture.tie_word_embeddings": FLAG,
    "method.adapter.target_modules": Rule("text", many="or list", null=True),
    "method.adapter.exclude_modules": Rule("text", many="or list", null=True),
    "method.adapter.modules_to_save": Rule("text", many="list", null=True),
    "method.adapter.layers_to_transform": Rule("whole", 0, many="or list", null=True),
    "method.adapter.layers_pattern": Rule("text", many="or list", null=True),
    "method.adapter.task_type": Rule("word", words=("CAUSAL_LM",)),
    "method.adapter.allow_uneven": FLAG,
    "method.adapter.bias": Rule("word", words=("none", "all", "lora_only")),
    "method.adapter.use_dora": FLAG,
    "method.adapter.use_rslora": FLAG,
    "method.adapter.rank_pattern": replace(COUNT, many="map"),
    "method.adapter.alpha_pattern": replace(ALPHA, many="map"),
    "method.adapter.num_blocks": Rule("whole", 1, words=("auto",), mapped=True),
    "method.adapter.mode": Rule("word", words=("auto", "adapter", "in_place")),
    "method.adapter.dropout": DROPOUT,
    "method.adapter.recompute_inputs": FLAG,
    "method.adapter.pattern": Rule("word", words=PATTERNS),
    "method.adapter.density": Rule("share", 0, 1, above=True),
    "method.adapter.count": replace(COUNT, null=True),
    "method.adapter.down_ratio": SHARE,
    "method.adapter.o_ratio": SHARE,
    "method.adapter.block_size": COUNT,
    "method.adapter.r": COUNT,
    "method.adapter.lora_alpha": ALPHA,
    "method.adapter.lora_dropout": DROPOUT,
    "method.adapter.sparsity": DROPOUT,
    "method.adapter.bottleneck_size": COUNT,
    "method.adapter.num_virtual_tokens": COUNT,
    "method.prepare.iterations": COUNT,
    "method.prepare.score": Rule("word", words=("mean_abs", "abs_mean")),
    "quantization.options.rank": COUNT,
    "quantization.options.lora_alpha": ALPHA,
    "quantization.options.alpha": Rule("number", 0, null=True),
    "quantization.options.passes": replace(COUNT, null=True),
    "quantization.options.damp_percent": Rule("number", 0, 1),
    "quantization.options.epochs": COUNT,
    "quantization.options.iterations": COUNT,
    "quantization.options.seed": Rule("whole", 0, 2**32 - 1),
}
