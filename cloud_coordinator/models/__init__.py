"""Model versions: from a run's final parameters to signed, checked, downloadable artifacts."""
