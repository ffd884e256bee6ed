"""What a few minutes on a GPU are for: correctness, methods, resume, speed, a queue of runs."""
