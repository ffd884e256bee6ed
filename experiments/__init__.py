"""Runs: configs, data, base models, training, planning and speed. Each folder is a stage."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # root of the clone; commands run here
CONFIGS = ROOT / "configs"
