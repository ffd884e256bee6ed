"""Runs: configs, data, base models, training, planning and speed. Each folder is a stage."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # root of the clone; commands run here
CONFIGS = ROOT / "configs"


def cache_folder() -> Path:
    """Return the folder of what commands keep for later ones: `$DIABLO_CACHE`, by default ~/.cache/diablo."""
    return Path(os.environ.get("DIABLO_CACHE") or Path.home() / ".cache" / "diablo")
