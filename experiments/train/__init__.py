"""The training of one run."""
