"""Runs on a cluster: one job array over a frozen list of run directories."""
