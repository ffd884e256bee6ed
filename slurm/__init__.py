"""Runs on a cluster: one array of jobs over a frozen list of run directories."""
