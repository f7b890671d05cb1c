"""Experiments, the demo and the benchmarks, on the same parts that production runs."""
