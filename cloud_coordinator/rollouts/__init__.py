"""Rollouts: which model version each device should serve, and whether it does."""
