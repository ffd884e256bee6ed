"""From configs to runs: compose, sweep, choose learning rates, count, and estimate memory and cost."""
