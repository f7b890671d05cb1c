"""Rounds: who is asked, how updates become the next parameters, and the door to Flower."""
