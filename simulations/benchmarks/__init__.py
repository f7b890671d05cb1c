"""Measurements beside their references, made in the same run on the same machine."""
