"""Tables of docs/results.md that are measurements: speed, memory, quantisation and tokens, from JSON in results/."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.results_tables import RESULTS, described, groups
from analysis.tables import markdown
from experiments.runs.records import read_json

FLOOR = "frozen floor"


@cache
def record(name: str) -> dict[str, Any]:
    return read_json(RESULTS / name)


def device(name: str) -> str:
    """Return device, versions and commit of a measurement."""
    environment = record(name)["environment"]
    return f"{environment['device']}, {described([environment])}"


def note(name: str) -> str:
    """Return what a measurement's record says about how it was made."""
    return str(record(name)["note"])


def ratio(case: dict[str, Any], label: str, key: str = "seconds") -> str:
    """Return a method's time relative to the floor's pass, taken within each round: median and quartiles."""
    entries = case["entries"]
    low, middle, high = np.percentile(np.array(entries[label][key]) / np.array(entries[FLOOR]["seconds"]), [25, 50, 75])
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def whole_model(name: str) -> str:
    """Return the table of a whole model, and above it what was measured."""
    (case,) = record(name)["models"]
    floor = case["entries"][FLOOR]
    rows = [
        {
            "Method": label,
            "Trained": f"{entry['parameters']:,}",
            "Pass ÷ floor (25–75 %)": ratio(case, label),
            "Step with AdamW ÷ floor": ratio(case, label, "step_seconds"),
            "Peak beyond weights, MB": f"{entry['peak_bytes'] / 1e6:,.0f}",
        }
        for label, entry in case["entries"].items()
        if label != FLOOR
    ]
    floor_ms, floor_mb = 1e3 * statistics.median(floor["seconds"]), floor["peak_bytes"] / 1e6
    about = (
        f"`{case['model']}` ({case['base_parameters']:,} parameters, random weights), {case['targets']}, "
        f"{case['tokens']:,} tokens in rows of {case['length']}, N = {case['num_blocks']}, r = {case['rank']}, "
        f"{record(name)['dtype']}, {len(floor['seconds'])} interleaved rounds, medians with quartiles. The floor takes "
        f"{floor_ms:,.0f} ms and {floor_mb:,.0f} MB beyond the weights."
    )
    return f"{about}\n\n{markdown(pd.DataFrame(rows))}"


def layers(name: str) -> str:
    """Return single layers: a row per shape, a column per method, time over the floor's."""
    cases = record(name)["layers"]
    labels = [label for label in cases[0]["entries"] if label != FLOOR]
    rows = [
        {
            "in × out": " × ".join(map(str, case["shape"])),
            "Floor, ms": f"{1e3 * statistics.median(case['entries'][FLOOR]['seconds']):.2f}",
            **{label: ratio(case, label).split(" ")[0] for label in labels},
        }
        for case in cases
    ]
    return markdown(pd.DataFrame(rows))


def products(name: str) -> str:
    """Return the products inside a layer, alone: a row per way to compute them, a column per shape, in microseconds."""
    found = record(name)
    cases = found["layers"]
    rows = [
        {"Microseconds": label}
        | {" × ".join(map(str, case["shape"])): f"{case['microseconds'][label]:.0f}" for case in cases}
        for label in cases[0]["microseconds"]
    ]
    about = f"{found['dtype']}, {found['tokens']:,} tokens, N = {cases[0]['num_blocks']}"
    return f"In {about}:\n\n{markdown(pd.DataFrame(rows))}"


def gpu_methods() -> str:
    """Return what every method did in a few steps on the GPU."""
    found = record("gpu_h200/methods.json")
    rows = [
        {
            "Method": item["name"],
            "Trained": f"{item['trainable_parameters']:,}",
            "Steps": item["steps"],
            "Loss, first → last": f"{item['losses'][0]:.3f} → {item['losses'][-1]:.3f}" if item["losses"] else "",
            "Peak, MB": f"{item['peak_memory_bytes'] / 1e6:,.0f}",
            **({"Error": item["error"] or ""} if any(item["error"] for item in found["items"]) else {}),
        }
        for item in found["items"]
    ]
    left = ", ".join(found["left_out"])
    return f"{markdown(pd.DataFrame(rows))}\nNot reached in the time: {left}."


def correctness() -> str:
    (item,) = record("gpu_h200/correctness.json")["items"]
    return f"{item['passed']} tests passed, {item['failed']} failed"


def peaks() -> str:
    rows = []
    for run in record("gpu_h200/peaks.json")["runs"]:
        method = next(word.partition("=")[2] for word in run["overrides"] if word.startswith("method="))
        measured, estimated = run["peak_bytes"], run["estimated_bytes"]
        rows.append(
            {
                "Run": f"{run['model']}, {method}",
                "Measured, GB": f"{measured / 1e9:.2f}",
                "Estimated, GB": f"{estimated / 1e9:.2f}",
                "Estimated ÷ measured": f"{estimated / measured:.3f}",
            }
        )
    return markdown(pd.DataFrame(rows))


def quantise_seconds() -> str:
    found = record("benchmark_quantized/quantize_benchmark.json")
    rows = [
        {"Quantiser": entry["entry"], "Seconds per decoder layer": f"{entry['seconds_per_layer']:.3g}"}
        for entry in found["quantise"]
        if entry["entry"] != "activations"
    ]
    return markdown(pd.DataFrame(rows))


def quantise_errors() -> str:
    """Return the squared error of the outputs of all layers, over rounding's."""
    frame = pd.DataFrame(record("benchmark_quantized/quantize_benchmark.json")["errors"])
    summed: dict[tuple[Any, Any], float] = {key: part["error"].sum() for key, part in groups(frame, ["bits", "method"])}
    names = ("rtn", "nf", "gptq", "magr")
    rows = [
        {"Bits": bits, **{name: f"{summed[bits, name] / summed[bits, 'rtn']:.2f}" for name in names}}
        for bits in frame["bits"].unique()
    ]
    return markdown(pd.DataFrame(rows))


def quantised_passes() -> str:
    """Return training passes over a packed base, over those of the full-precision one."""
    rows = [
        {
            "Pass": entry["entry"],
            "Median, s": f"{statistics.median(entry['seconds']):.3f}",
            "÷ full precision": f"{entry['ratio_to_full_precision']:.2f}",
        }
        for entry in record("benchmark_quantized/quantize_benchmark.json")["step"]
    ]
    return markdown(pd.DataFrame(rows))


def quantised_memory() -> str:
    rows = []
    for name in ("quantize_benchmark", "memory_2bits"):
        found = record(f"benchmark_quantized/{name}.json")
        (memory,) = found["memory"]
        rows.append(
            {
                "Bits": found["bits"],
                "fp16, MB": f"{memory['fp16_bytes'] / 1e6:,.0f}",
                "Packed, MB": f"{memory['packed_bytes'] / 1e6:,.0f}",
                "Peak of building and running it, MB": f"{memory['peak_bytes'] / 1e6:,.0f}",
            }
        )
    return markdown(pd.DataFrame(rows))


def tokens() -> str:
    found = record("tokens/benchmark.json")
    rows = [
        {
            "Protocol": name,
            "Rows": f"{one['rows']:,}",
            "Tokens": f"{one['tokens']:,}",
            "Seconds": f"{one['seconds']:.1f}",
            "From the cache, s": f"{one['cached_seconds']:.1f}",
            "Extra memory, MB": f"{one['peak_extra_bytes'] / 1e6:.0f}",
            **{
                f"Padding in batches of {size}, shuffled → grouped, %": " → ".join(
                    f"{100 * part[way]:.1f}" for way in ("shuffled", "grouped")
                )
                for size, part in one["padding"].items()
            },
        }
        for name, one in found["protocols"].items()
    ]
    return markdown(pd.DataFrame(rows))


def reports() -> str:
    """Return what a report of thousands of runs takes."""
    found = record("reports/reports.json")
    rows = [
        {
            "Report": f"{found['runs']:,} runs of {found['settings']} settings, {kind}",
            "Seconds": f"{one['seconds']:.0f}",
            "Processor time, s": f"{one['processor_seconds']:.0f}",
            "Peak of a process, MB": f"{one['peak_bytes'] / 1e6:,.0f}",
        }
        for kind, one in found["reports"].items()
    ]
    return markdown(pd.DataFrame(rows))


def generation(name: str) -> str:
    """Return a sentence about what was asked, and a row per back end."""
    found = record(name)
    entries, total = found["entries"], found["rows"] * found["samples"]
    settings = found["generation"]
    drawn = f", {found['samples']} samples of each at temperature {settings['temperature']}" * (found["samples"] > 1)
    rows: list[dict[str, str]] = []
    for label, entry in entries.items():
        ratios = np.array(entry["seconds"]) / np.array(entries["hf"]["seconds"])
        rows.append(
            {
                "Back end": label,
                "Seconds": f"{statistics.median(entry['seconds']):.1f}",
                "Tokens per second": f"{entry['completion_tokens'] / statistics.median(entry['seconds']):.0f}",
                "Time over hf's (range)": f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
                "Equal to hf's": f"{entry['equal_to_hf']} of {total}" if found["samples"] == 1 else "",
            }
        )
    asked = (
        f"{found['rows']} rows of {found['benchmark']}{drawn}, {found['prompt_tokens']:,} prompt tokens, at most "
        f"{settings['max_new_tokens']} new ones, {found['batch_size']} rows at once, {found['dtype']}, "
        f"{len(entries['hf']['seconds'])} interleaved rounds"
    )
    return f"{asked}:\n\n{markdown(pd.DataFrame(rows))}"


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(device, note, whole_model, layers, products, gpu_methods, correctness, peaks, quantise_seconds),
        *(quantise_errors, quantised_passes, quantised_memory, tokens, reports, generation),
    )
}
