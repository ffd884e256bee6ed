"""Runs: their configs, data, base models, training, planning and speed. Each folder is a stage."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the clone, in which commands run
CONFIGS = ROOT / "configs"
