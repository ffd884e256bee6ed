"""The run directory: its records, paths, locks and attempts. Needs no torch."""
