"""Git ids that pin the content of the data sets' files; the commits in their URLs determine them."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

# By file, unpacked: the output of `git hash-object FILE`, equal to the id in the URL's commit. Two files are
# made from others (`Split.rebuild`). MetaMathQA is the hub's own object, not a git object, and HEx-PHI is gated.
GIT_IDS = {
    "llm_adapters/boolq/train.json": "87a7beee26b49f81c450641ef2ff84f55611321f",
    "llm_adapters/boolq/test.json": "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3",
    "derived/piqa_train.json": "44326ba946f8bd645bfa7a189e619d29b5bc17e5",
    "llm_adapters/piqa/test.json": "f7a1c260692ef31796d4763cb6334f316a754fed",
    "llm_adapters/social_i_qa/train.json": "bd524129d80efdfabc8476bbedc4f41b400cfda0",
    "llm_adapters/social_i_qa/test.json": "eadf221799ca394367b144c0f86ee0436db409d2",
    "llm_adapters/hellaswag/train.json": "ca68dc85fc2a2f73c9b1b8b0823cc41a8f669718",
    "llm_adapters/hellaswag/test.json": "183c4920415f83ba4b793c4873a33e7e10bd1be5",
    "derived/winogrande_xl_train.json": "f8863307c40f9b708e759962568920079c7bd56b",
    "llm_adapters/winogrande/test.json": "21257263593dd4d00546e1918c88ca0f357b08ad",
    "llm_adapters/ARC-Easy/train.json": "488a8e5e5bbbd7a630ebbfe07a1fd91b7d9d8c9b",
    "llm_adapters/ARC-Easy/test.json": "6c0d30aaedaeca148df6bcd7aaacf7c31e6ad70f",
    "llm_adapters/ARC-Challenge/train.json": "d7e080b04bff9fd16dd85455fb04481807a088d8",
    "llm_adapters/ARC-Challenge/test.json": "9540685439144200b5a7e48dab9ca4655be2af09",
    "llm_adapters/openbookqa/train.json": "75bcd5eb9f5e77a3796c05e6bb38f169d19563fc",
    "llm_adapters/openbookqa/test.json": "a6e69676104bcb77237388c3b5a3f0dcbb81d1e2",
    "derived/hellaswag_val1000_test.json": "110ace4fbee207844ead7acce1649b3572b8be6f",
    "llm_adapters/commonsense_170k.json": "529e426b33d4cdb1d0c4a275a1a7245ad081fd91",
    "gsm8k/train.jsonl": "7d97154b91aef28d01c3301741c81ce90039a4b1",
    "gsm8k/test.jsonl": "e4c2ff4942b9a78bd74f04141224c11e28d12dc9",
    "math/test.jsonl": "87d7931a3fa757e3bac4602e5bed86d223944e59",
    "llm_adapters/math_10k.json": "27dba77d6ed80aa118d78fbafa5cecd651f6d463",
    "llm_adapters/SVAMP/test.json": "98b8f1872db596f8aaff2c95d1d698a9fa13b94f",
    "llm_adapters/mawps/trainset.json": "30ce34399859c115cb391ac96fd009f71f5ba98f",
    "llm_adapters/mawps/test.json": "eca473c5b5d398acbae0b84ede833bbbccd63add",
    "llm_adapters/AQuA/test.json": "731fbb456f7a93bb4121125de09c4adcf42e5dab",
    "human_eval/HumanEval.jsonl": "d453631d786a92af7f44ca30918c7fcdcd1fb932",
    "code_alpaca/code_alpaca_20k.json": "4599591b17572755907bd945e34d25a956dcab09",
    "code_alpaca/code_alpaca_2k.json": "72d030181710b5ab46e042a7146773dac3f88998",
    "code_alpaca/new_codealpaca.json": "a796943bd3a28c9877e19a677ce7c7fcceca1f33",
    "safety/saferpaca_Instructions_2000.json": "4f16a9be684ca7acf1715a763f9570a857008822",
    "safety/safety_only_data_Instructions.json": "d88a92ea00f189f635fdb893de94d45e444d9c71",
    "safety/alpaca_5000.json": "c7575709e3ab7761acdc77f1ed6b0e05ee7c2ba5",
    "safety/advbench_harmful_behaviors.csv": "b3194fa748b709a680891ec0e87509f328db1bb6",
    "safety/xstest_prompts.csv": "ad38204d70b3964387f9690169d11afbc4756d01",
}


def not_pinned(file: str, path: Path) -> str | None:
    """Return how the content of `path` differs from the pinned `file`; None if it does not or if there is no id."""
    expected = GIT_IDS.get(file)
    if expected is None:
        return None
    try:
        found = git_id(path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"it cannot be unpacked ({error})"
    return None if found == expected else f"its git id is {found[:12]}, it must be {expected[:12]}"


def git_id(path: Path) -> str:
    """Return what `git hash-object` prints for a file, unpacked if it ends in .gz. Git hashes the length first."""
    digest = hashlib.sha1(f"blob {sum(map(len, _content(path)))}\0".encode(), usedforsecurity=False)
    for block in _content(path):
        digest.update(block)
    return digest.hexdigest()


def _content(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
