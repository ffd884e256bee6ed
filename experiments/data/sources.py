"""The table of data sets: their sources, their number of rows, and how their records become rows.

A row is a flat object of strings: `instruction` (the question), `input` (its context, "" if there is none), `output`
(the target; in a test a reference solution) and `answer` (what scoring compares with, "" if there is nothing to
compare). Some rows have more fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, str]
Record = dict[str, Any]  # one object of a JSON file, one line of a CSV file or one row of the hub
Maker = Callable[[Record], Row | None]


@dataclass(frozen=True)
class Split:
    """One file. `make` turns a record into a row, or into None if the record is not in this data set.

    `make` raises a ValueError that says what is wrong with the record.
    """

    file: str  # under the data root; .json (a list), .jsonl or .csv, plain or with .gz appended to its name
    rows: tuple[int, ...]  # number of rows; two numbers if two releases are in use
    make: Maker
    url: str
    how: str | None = None  # how to get a file with restricted access
    rebuild: Callable[[Record], Record] | None = None  # if url has other records: makes this file's records from them
    columns: tuple[str, ...] | None = None  # header of a CSV file without one


@dataclass(frozen=True)
class Hub:
    """The same rows on the Hugging Face hub: data set, revision and configurations, concatenated in this order."""

    name: str
    revision: str
    configurations: tuple[str, ...]


# Records to rows


def text(record: Record, field: str) -> str:
    if field not in record:
        raise ValueError(f"the field {field!r} is missing: there are {', '.join(map(str, record))}")
    if not isinstance(record[field], str):
        raise ValueError(f"the field {field!r} must be text, not {record[field]!r:.40}")
    return record[field]


def alpaca(record: Record) -> Row:
    """tatsu-lab/stanford_alpaca's format, without a short answer."""
    return {field: text(record, field) for field in ("instruction", "input", "output")} | {"answer": ""}


def llm_adapters(record: Record) -> Row:
    """LLM-Adapters' format, equal to ours. `output` in its arithmetic tests is ChatGPT's and may be wrong."""
    return {field: text(record, field) for field in ("instruction", "input", "output", "answer")}


def gsm8k(record: Record) -> Row:
    output = text(record, "answer")
    _, marks, answer = output.rpartition("#### ")
    if not marks:
        raise ValueError("the field 'answer' has no '#### ' before its number")
    return _row(text(record, "question"), output, answer.replace(",", "").strip())


def math(record: Record) -> Row:
    solution = text(record, "solution")
    answer = boxed(solution)
    if answer is None:
        raise ValueError(r"the field 'solution' has no readable \boxed{…}")
    return _row(text(record, "problem"), solution, answer, level=text(record, "level"), type=text(record, "type"))


def boxed(solution: str) -> str | None:
    r"""Return the content of the last \boxed{…}, or of \fbox{…} if there is no \boxed; None if its brace stays open.

    Braces are counted as in hendrycks/math, including escaped ones. `\boxed 5$` contains the word up to the $.
    """
    for command in (r"\boxed", r"\fbox"):
        _, found, rest = solution.rpartition(command)
        if found:
            break
    else:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        words = rest.replace("$", " ").split()
        return words[0] if words else None
    depth = 0
    for end, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:end]
    return None


def metamathqa(record: Record) -> Row:
    return _row(text(record, "query"), text(record, "response"), "", type=text(record, "type"))


def mawps_train(record: Record) -> Row:
    """Equation and answer in GSM8K's format. `ans` is a number in some records and text in others."""
    answer = record.get("ans")
    try:
        number = float(answer)  # pyright: ignore[reportArgumentType]  float refuses anything else
    except (TypeError, ValueError):
        raise ValueError(f"the field 'ans' must be a number, not {answer!r:.40}") from None
    answer = str(int(number)) if number.is_integer() else str(answer)
    return _row(text(record, "original_text"), f"{text(record, 'equation')}\n#### {answer}", answer)


def human_eval(record: Record) -> Row:
    further = {field: text(record, field) for field in ("test", "entry_point", "task_id")}
    return _row(text(record, "prompt"), text(record, "canonical_solution"), "", **further)


def hex_phi(record: Record) -> Row:
    return _row(text(record, "instruction"), "", "safe", category=text(record, "category"))


def advbench(record: Record) -> Row:
    return _row(text(record, "behaviour"), "", "safe")


def xstest(label: str) -> Maker:
    """The prompts with one label. Those labelled safe measure how often harmless requests are refused."""

    def make(record: Record) -> Row | None:
        if text(record, "label") not in ("safe", "unsafe"):
            raise ValueError(f"the field 'label' must be safe or unsafe, not {record['label']!r:.40}")
        row = _row(text(record, "prompt"), "", "safe", category=text(record, "type"))
        return row if record["label"] == label else None

    return make


# Records to files: from allenai/OLMo's evaluation requests, which contain a record (`doc`) once per option


def winogrande_request(record: Record) -> Record:
    doc = record["doc"]
    question = (
        f"Please choose the correct answer to fill in the blank to complete the given sentence: {doc['sentence']}"
    )
    options = f"Option1: {doc['option1']} Option2: {doc['option2']} Answer format: option1/option2"
    return _option(f"{question}\n\n{options}", f"option{doc['answer']}")


def hellaswag_request(record: Record) -> Record:
    doc = record["doc"]
    endings = " ".join(f"Ending{number}: {ending}" for number, ending in enumerate(doc["choices"], start=1))
    question = f"Please choose the correct ending to complete the given sentence: {doc['query']}\n\n{endings}"
    form = "Answer format: ending1/ending2/ending3/ending4"
    return _option(f"{question}\n\n{form}", f"ending{doc['gold'] + 1}") | {"ind": doc["ind"]}


def _option(instruction: str, answer: str) -> Record:
    return dict(_row(instruction, f"the correct answer is {answer}", answer))


def _row(instruction: str, output: str, answer: str, **further: str) -> Row:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer, **further}


# The table

_GITHUB = "https://raw.githubusercontent.com"
_LLM_ADAPTERS = f"{_GITHUB}/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a"
_OLMO = f"{_GITHUB}/allenai/OLMo/59a53e3f68e546330ca5a99ec626e58f9ab96494/olmo_data/oe_eval_tasks"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_TORA = f"{_GITHUB}/microsoft/ToRA/213c1c995038c73fab10343814df7a42f990f026/src/data"
_META_MATH = "https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18"
_HUMAN_EVAL = f"{_GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data"
_CODE_ALPACA = f"{_GITHUB}/sahil280114/codealpaca/2f78ddc5c682ed6738ad092bbbfa59ba915afcb0/data"
_SAFETY_TUNED = f"{_GITHUB}/vinid/safety-tuned-llamas/36a4b8d5c2177ed165bf61f59b590161394f7f12/data/training"
_STANFORD = f"{_GITHUB}/tatsu-lab/stanford_alpaca/5e69c50054c48cd3b919c46d13bb2d92a62f4498"
_XSTEST = f"{_GITHUB}/paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
_FINETUNING_SAFETY = (
    f"{_GITHUB}/LLM-Tuning-Safety/LLMs-Finetuning-Safety/8a3b38f11be1c3829e2b0ed379d3661ebc84e7db/llama2"
)


def _train(file: str, make: Maker, url: str, *rows: int, **more: Any) -> dict[str, Split]:
    return {"train": Split(file, rows, make, url, **more)}


def _test(file: str, make: Maker, url: str, *rows: int, **more: Any) -> dict[str, Split]:
    return {"test": Split(file, rows, make, url, **more)}


def _llm_adapters(folder: str, **rows: int) -> dict[str, Split]:
    """Splits of LLM-Adapters' `dataset/<folder>`."""
    return {
        split: Split(
            f"llm_adapters/{folder}/{split}.json",
            (count,),
            llm_adapters,
            f"{_LLM_ADAPTERS}/dataset/{folder}/{split}.json",
        )
        for split, count in rows.items()
    }


# LLM-Adapters' ft-training_set/math_data.json (3,260 rows) must not be used: it is made from the test sets of GSM8K,
# SVAMP, AQuA, MultiArith, AddSub and SingleEq.
SOURCES: dict[str, dict[str, Split]] = {
    # Commonsense. The tests of the first five are public validation splits.
    "boolq": _llm_adapters("boolq", train=9_427, test=3_270),
    "piqa": _train(
        "derived/piqa_train.json",
        llm_adapters,
        f"{_LLM_ADAPTERS}/dataset/piqa/train.json",
        16_113,
    )
    | _llm_adapters("piqa", test=1_838),
    "social_i_qa": _llm_adapters("social_i_qa", train=33_410, test=1_954),
    "hellaswag": _llm_adapters("hellaswag", train=39_905, test=10_042),
    # Only the size xl. LLM-Adapters' own file joins all sizes (63,238 rows), so that most problems repeat.
    "winogrande": _train(
        "derived/winogrande_xl_train.json",
        llm_adapters,
        f"{_OLMO}/winogrande/train_mc_5shot/requests.jsonl.gz",
        40_398,
        rebuild=winogrande_request,
    )
    | _llm_adapters("winogrande", test=1_267),
    "arc_easy": _llm_adapters("ARC-Easy", train=2_251, test=2_376),
    "arc_challenge": _llm_adapters("ARC-Challenge", train=1_119, test=1_172),
    "openbookqa": _llm_adapters("openbookqa", train=4_957, test=500),
    # 1,000 rows of HellaSwag's test in other wording (no [header] marks): scores on them are not HellaSwag scores.
    "hellaswag_sample": _test(
        "derived/hellaswag_val1000_test.json",
        llm_adapters,
        f"{_OLMO}/hellaswag/rc_5shot/requests.jsonl.gz",
        1_000,
        rebuild=hellaswag_request,
    ),
    "commonsense_170k": _train(
        "llm_adapters/commonsense_170k.json",
        llm_adapters,
        f"{_LLM_ADAPTERS}/ft-training_set/commonsense_170k.json",
        170_420,
    ),
    # Mathematics
    "gsm8k": _train("gsm8k/train.jsonl", gsm8k, f"{_GSM8K}/train.jsonl", 7_473)
    | _test("gsm8k/test.jsonl", gsm8k, f"{_GSM8K}/test.jsonl", 1_319),
    "math": _test("math/test.jsonl", math, f"{_TORA}/math/test.jsonl", 5_000),
    "metamathqa": _train("metamathqa/MetaMathQA-395K.json", metamathqa, f"{_META_MATH}/MetaMathQA-395K.json", 395_000),
    "math_10k": _train("llm_adapters/math_10k.json", alpaca, f"{_LLM_ADAPTERS}/ft-training_set/math_10k.json", 9_919),
    "svamp": _llm_adapters("SVAMP", test=1_000),
    # 28 test questions are also in the training set, ignoring case and punctuation.
    "mawps": _train(
        "llm_adapters/mawps/trainset.json", mawps_train, f"{_LLM_ADAPTERS}/dataset/mawps/trainset.json", 1_898
    )
    | _llm_adapters("mawps", test=238),
    "aqua": _llm_adapters("AQuA", test=254),
    # Code
    "human_eval": _test(
        "human_eval/HumanEval.jsonl",
        human_eval,
        f"{_HUMAN_EVAL}/HumanEval.jsonl.gz",
        164,
    ),
    "code_alpaca": _train("code_alpaca/code_alpaca_20k.json", alpaca, f"{_CODE_ALPACA}/code_alpaca_20k.json", 20_022),
    "code_alpaca_2k": _train("code_alpaca/code_alpaca_2k.json", alpaca, f"{_CODE_ALPACA}/code_alpaca_2k.json", 2_017),
    # Its records also have `response`, equal to `output` in all 4,535.
    "code_alpaca_new": _train("code_alpaca/new_codealpaca.json", alpaca, f"{_CODE_ALPACA}/new_codealpaca.json", 4_535),
    # Safety
    "saferpaca": _train(
        "safety/saferpaca_Instructions_2000.json",
        alpaca,
        f"{_SAFETY_TUNED}/saferpaca_Instructions_2000.json",
        22_000,
    ),
    "safety_refusals": _train(
        "safety/safety_only_data_Instructions.json",
        alpaca,
        f"{_SAFETY_TUNED}/safety_only_data_Instructions.json",
        2_483,
    ),
    "alpaca_5000": _train("safety/alpaca_5000.json", alpaca, f"{_STANFORD}/data/alpaca_5000.json", 5_000),
    "hex_phi": _test(  # 330 prompts originally, 300 today
        "hex_phi/hex_phi.jsonl",
        hex_phi,
        "https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI",
        330,
        300,
        how="it is gated: request access at {url} under its licence agreement, then write its prompts to {file} as "
        "JSON lines with instruction and category; advbench and xstest_unsafe are the open stand-ins",
    ),
    "advbench": _test(
        "safety/advbench_harmful_behaviors.csv",
        advbench,
        f"{_FINETUNING_SAFETY}/safety_evaluation/data/harmful_behaviors.csv",
        520,
        columns=("behaviour",),
    ),
    "xstest_safe": _test("safety/xstest_prompts.csv", xstest("safe"), f"{_XSTEST}/xstest_prompts.csv", 250),
    "xstest_unsafe": _test("safety/xstest_prompts.csv", xstest("unsafe"), f"{_XSTEST}/xstest_prompts.csv", 200),
}

# The hub has MATH by subject: the same rows as the file, in another order.
HUBS = {
    "gsm8k": Hub("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", ("main",)),
    "math": Hub(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
    ),
    "metamathqa": Hub("meta-math/MetaMathQA", "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18", ("default",)),
    "human_eval": Hub("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", ("openai_humaneval",)),
    "code_alpaca": Hub("sahil2801/CodeAlpaca-20k", "152bb5e9a29651266b018106053980070a0521a1", ("default",)),
}

# Licences of data as these repositories state them, in their LICENSE or DATA_LICENSE, with the hub's ids. The others'
# are not recorded here: some repositories only pass on data that keeps its own terms.
LICENCES = {
    _LLM_ADAPTERS: "odc-by",
    _GSM8K: "mit",
    _TORA: "mit",
    _HUMAN_EVAL: "mit",
    _CODE_ALPACA: "cc-by-nc-4.0",
    _SAFETY_TUNED: "cc-by-nc-4.0",
    _STANFORD: "cc-by-nc-4.0",
    _XSTEST: "cc-by-4.0",
}


def page_and_licence(source: str, split: str = "train") -> tuple[str, str | None]:
    """Return the page of a data set and the licence it states, None if that is not recorded."""
    url = SOURCES[source][split].url
    licence = next((name for start, name in LICENCES.items() if url.startswith(f"{start}/")), None)
    if url.startswith(f"{_GITHUB}/"):
        return "https://github.com/" + "/".join(url.removeprefix(f"{_GITHUB}/").split("/")[:2]), licence
    return url.split("/resolve/")[0], licence
