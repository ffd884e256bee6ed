"""Plan, train, score and report an experiment."""
