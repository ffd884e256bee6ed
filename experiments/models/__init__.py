"""Base models: from the hub, a folder, a GGUF file, made here, or quantised."""
