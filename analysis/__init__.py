"""Tables and figures from records; needs no torch."""
