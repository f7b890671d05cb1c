"""Federated statistics: what a fleet's data are like, known only summed; pure, numpy alone."""
