"""Scores: completions, likelihoods, and how answers are read from them."""
