"""Sums that hide their terms: protocol, encoding, noise and its accounting; pure, without I/O."""
