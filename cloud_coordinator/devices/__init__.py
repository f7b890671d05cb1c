"""Devices: how they join, what is known of them, and how a request proves which one sent it."""
