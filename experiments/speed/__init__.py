"""Time and memory of methods, layers, quantisers and tokenisation."""
