"""Runs: from a plan to a model version, through crashes of every process on the way."""
