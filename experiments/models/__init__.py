"""Base models: from the hub, a folder or a GGUF file, generated, or quantised."""
