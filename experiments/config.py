"""A run's config, typed and frozen: every setting with its type, its range and what it means. Standard library only.

`python -m experiments.plan --help-config SECTION` prints it. The values come from configs/; `experiments.settings`
checks them and builds the `RunConfig`. These classes are not in Hydra's config store: OmegaConf would accept "16" for a
whole number and turn 3 into 3.0, which changes run ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from experiments.rules import Rule

Count = Annotated[int, Rule("whole", 1)]
Seed = Annotated[int, Rule("whole", 0, 2**32 - 1)]
Positive = Annotated[float, Rule("number", 0, above=True)]
Dropout = Annotated[float, Rule("number", 0, 1, below=True)]
Name = Annotated[str, Rule("name")]
Benchmark = Annotated[str, Rule("benchmark")]
Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
Backend = Literal["hf", "vllm"]
Searched = Literal["completion", "whole", "after_first_response", "all_after_first_response", "after_last_response"]
OPTIMIZERS = (  # transformers' names
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit"),
    *("adamw_torch_8bit", "adamw_anyprecision", "adamw_bnb_8bit", "adamw_8bit", "adafactor", "adagrad", "sgd"),
    *("ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit"),
    *("rmsprop_bnb_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo"),
    *("grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw"),
    *("apollo_adamw_layerwise", "stable_adamw"),
)
Optimizer = Annotated[str, Rule("word", words=OPTIMIZERS)]
PARSERS = (  # of eval/scoring.py
    *("hash_marks", "final_answer", "last_number", "metamath_number", "metamath_expression", "diablo_expression"),
    *("final_answer_expression", "first_option", "option_after_phrase", "exact_after_phrase", "first_letter"),
    *("refusal_keywords", "judged"),
)
EQUALITIES = (  # likewise
    *("same_text", "same_number", "near_number", "metamath_integer", "milora_number", "hendrycks", "metamath"),
    *("diablo", "milora", "milora_with_self_comparison"),
)
Parser = Annotated[str, Rule("word", words=PARSERS)]
Equality = Annotated[str, Rule("word", words=EQUALITIES)]


@dataclass(frozen=True)
class Pretraining:
    """The training of a small base model from random weights."""

    seed: Seed
    steps: Count
    batch_size: Count
    """Documents per step."""
    learning_rate: float


@dataclass(frozen=True)
class Gguf:
    """A GGUF file whose weights replace those of `path`."""

    file: str
    """A path, or a path inside an installed Python package."""
    sha256: Annotated[str, Rule("sha256")]
    package: str | None = None
    """The pip requirement that installs the file."""


@dataclass(frozen=True)
class Model:
    """The base model."""

    name: Name
    path: str | None
    """A hub id, a local folder or a GGUF file; null for a model that is trained here (`pretraining`)."""
    revision: str | None
    """The hub's branch, tag or commit."""
    dtype: Dtype
    """Dtype of the weights; auto: bfloat16 on a GPU that has it, float32 on a CPU."""
    architecture: Mapping[str, Any]
    """Fields of the transformers config: enough to count parameters and memory without weights."""
    pretraining: Pretraining | None
    gguf: Gguf | None = None


@dataclass(frozen=True)
class Prerequisite:
    """The run that is trained before: its method and learning rate, all else as in this run."""

    method: Method
    learning_rate: float


@dataclass(frozen=True)
class Method:
    """What is trained."""

    name: Name
    label: Name
    """The name with its size, as in tables and run ids."""
    trains: Literal["adapter", "all", "nothing"]
    adapter: Mapping[str, Any] | None
    """`_target_`, a PEFT config class of diablo or peft, and its fields; null without an adapter."""
    prepare: Mapping[str, Any] | None = None
    """`_target_`, a function that looks at training rows before the adapter is attached, and its arguments."""
    budget: Annotated[float, Rule("number", 0, 1, above=True)] | None = None
    """Largest share of the base's parameters; only with num_blocks=auto."""
    prerequisite: Annotated[Prerequisite | None, Rule("name", null=True)] = None  # in a method's file its name
    """The run that is trained before, whose adapter `prepare` reads."""


@dataclass(frozen=True)
class Calibration:
    """The text that quantisation with calibration looks at."""

    text: str | None
    """A text file; null: random stretches of the run's own training rows."""
    samples: Count
    length: Count
    """Tokens per sample."""
    seed: Seed


@dataclass(frozen=True)
class Quantization:
    """The quantisation of the base model."""

    method: Literal["rtn", "nf", "gptq", "magr", "loftq", "apiq"]
    bits: Annotated[int, Rule("whole", 2, 8)]
    group_size: Annotated[int, Rule("whole", -1)]
    """Weights of a row that share a scale; -1 for whole rows."""
    sym: bool
    """A grid symmetric about zero."""
    options: Mapping[str, Any]
    """Arguments of the method."""
    calibration: Calibration | None
    target_modules: str | tuple[str, ...] | None = None
    """Layers that get LoRA factors (loftq, apiq); the others are only quantised."""

    @property
    def with_factors(self) -> bool:
        """Whether the method also makes a LoRA for the weights."""
        return self.method in ("loftq", "apiq")


@dataclass(frozen=True)
class Data:
    """The rows of a task."""

    source: Name | tuple[Name, ...]
    """A data set of experiments/data/sources.py, or several, whose rows follow each other."""
    heldout: int = 0
    """Training rows kept out of training, on which learning rates are chosen."""
    seed: Seed | None = None
    """Of generated rows."""
    train: int | None = None
    """Number of generated training rows."""
    test: int | None = None
    """Number of generated test rows."""


@dataclass(frozen=True)
class Task:
    """What the run trains on."""

    name: Name
    data: Data
    target_modules: str | tuple[str, ...] | None
    """Linear layers that adapters are attached to, unless the method names its own."""


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule, epochs and batch. A task overrides the defaults."""

    learning_rate: float
    epochs: Positive
    max_steps: Count | None
    """Optimizer steps after which training stops, if the epochs are longer."""
    batch_size: Count
    """Rows per optimizer step, over all devices."""
    micro_batch_size: Count
    """Rows per forward pass and device."""
    optimizer: Optimizer
    """Any name that transformers' Trainer knows."""
    betas: tuple[Dropout, Dropout]
    weight_decay: float
    max_grad_norm: float
    schedule: Literal["linear", "cosine", "constant"]
    """Of the learning rate, after warmup_steps."""
    warmup_steps: float
    """Below one: a share of all steps."""
    adapter_dropout: Dropout
    """Dropout of the adapters whose authors use one."""
    group_by_length: bool
    """Rows of similar length share a micro-batch; the rows of an epoch stay the same."""


@dataclass(frozen=True)
class Spectra:
    """Measurement of the inputs of the trained linear layers and of the gradients of their outputs."""

    every: Count | None
    """Optimizer steps between measurements; null measures nothing and omits the section."""
    blocks: Count
    """Blocks into which a layer's inputs and outputs are cut."""
    tokens: Count
    """Tokens of a micro-batch, at most."""


@dataclass(frozen=True)
class Protocol:
    """How a row is trained on. A file of configs/protocol overrides the defaults."""

    name: Name
    version: Count
    prompt: str | None
    """Template of a row's fields: instruction, input, output, answer."""
    prompt_with_input: str | None
    """Prompt of rows whose input is not empty; null refuses such rows."""
    split_query: bool
    """The text after the first newline of an instruction is its input."""
    target: str
    replace: Mapping[str, str]
    """Replacements in the target: text to its replacement."""
    ending: str
    """Text between the target and the end of sequence."""
    joined: bool
    """Prompt and target are tokenised as one text, else each separately."""
    train_on_prompt: bool
    """The loss includes the prompt."""
    mask_counts_ending: bool
    """The prompt's mask is as long as prompt and ending together; only with joined."""
    bos: bool
    """Rows begin with what the tokenizer puts before a text: LLaMA's BOS, nothing for SmolLM2 and GPT-2. They end
    with its EOS, unless cut."""
    max_prompt_length: Count | None
    """Tokens kept of the prompt of a row longer than max_length."""
    max_target_length: Count | None
    """Tokens kept of the target, with its end of sequence, of a row longer than max_length."""
    max_length: Count
    """Tokens of prompt and target; a row that is cut loses its end of sequence."""
    repeated_prompts: Literal["all", "last"]
    """Of rows with equal prompts: all of them, or only the last."""


PerKind = Count | Mapping[str, Count]


@dataclass(frozen=True)
class Generation:
    """What decides the completions. A value may be a map from a benchmark or a kind of answer."""

    num_beams: PerKind
    """Without sampling."""
    max_new_tokens: PerKind
    stop: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    """A completion ends before any of these."""
    samples: PerKind
    """Completions per row; more than one are sampled, with the next three."""
    temperature: float | Mapping[str, float] | None
    top_p: Annotated[float, Rule("number", 0, 1, above=True)] | Mapping[str, float] | None
    top_k: int | Mapping[str, int] | None
    max_length: PerKind | None
    """Tokens of prompt and completion together."""


@dataclass(frozen=True)
class Judge:
    """The chat model that reads completions, of protocols that have one."""

    model: str | None
    """A hub id or a folder, instruction-tuned."""
    revision: str | None
    backend: Backend
    dtype: Dtype
    max_new_tokens: Count
    question: str


@dataclass(frozen=True)
class Evaluation:
    """How the run is scored; may change after training. A protocol overrides the settings before `benchmarks`.

    A value may be a map from a benchmark or a kind of answer.
    """

    protocol: Name
    version: Count
    prompt: str | None
    prompt_with_input: str | None
    strip_prompt: bool
    """White space around the prompt is removed."""
    bos: bool
    generation: Generation
    searched: Searched | Mapping[str, Searched]
    """The text that is read: the completion, prompt and completion, or their part after a response mark."""
    parser: Parser | Mapping[str, Parser]
    """A function of eval/parsers.py for each kind of answer."""
    equality: Equality | Mapping[str, Equality]
    """A function of eval/equality.py for each kind of answer."""
    full_batches_of: PerKind | None
    """Score only as many rows as fill batches of this size."""
    judge: Judge | None

    benchmarks: tuple[Benchmark, ...]
    mean: bool
    """Tables also give the plain mean over the benchmarks."""
    limit: PerKind | None
    """Score only so many rows, for a quick look."""
    batch_size: Count
    """Most rows at once; where these do not fit into memory, half as many."""
    backend: Backend
    merge: bool
    """Fold the adapter into the weights before generating; not every method can."""
    sandbox: Literal["bwrap", "none"]
    """Where model-written programs run: in bwrap, or none without any protection, which eval.run must be told too."""


@dataclass(frozen=True)
class Runtime:
    """Where and how the run is trained and scored; changes no result."""

    runs_dir: str
    data_root: str | None
    """Folder of local data sets; null loads them from the Hugging Face hub."""
    cache_dir: str
    """Base models made here, tokenised rows."""
    device: Annotated[str, Rule("device")]
    """auto: a GPU if there is one."""
    gradient_checkpointing: bool
    checkpoint_every: Count
    """Optimizer steps."""
    wandb: Literal["off", "offline", "online"]
    sharding: Literal["auto", "none", "full"] = "none"
    """full: each process holds a part of the model, its gradients and optimizer state (FSDP2); auto: none, but full
    where slurm.submit finds that a run does not fit one GPU."""


@dataclass(frozen=True)
class RunConfig:
    """One run: model × method × task × seed. All but `evaluation` and `runtime` is part of the run id.

    `mapping` is the content of config.yaml, which hashes are of: settings that are not there are not in it.
    """

    run_id: Name
    seed: Seed
    """Of initialisation, data order and dropout."""
    model: Model
    method: Method
    task: Task
    recipe: Recipe
    protocol: Protocol
    evaluation: Evaluation
    runtime: Runtime
    quantization: Quantization | None = None
    spectra: Spectra | None = None
    mapping: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    def not_shardable(self) -> str | None:
        """Return why the run cannot be sharded; None if it can."""
        if self.quantization is not None:
            return "every process would hold all of a quantised base, whose weights are not parameters"
        if self.spectra is not None:
            return "spectra (spectra.every) can only be measured where a process has whole weights"
        return None
