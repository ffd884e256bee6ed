"""Checks for a few minutes on a GPU: correctness, methods, resume, speed, a queue of runs."""
