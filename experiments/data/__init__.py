"""Rows, prompts and tokens: where they come from and what a protocol makes of them."""
