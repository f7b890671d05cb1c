"""The coordinator's door to Flower: the SuperLink child, and the Grid that a run's worker uses."""
