"""Rows, prompts and tokens: sources of the data, and what a protocol makes of them."""
