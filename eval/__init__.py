"""Scoring: completions, likelihoods, and how answers are read from completions."""
