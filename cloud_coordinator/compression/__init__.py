"""From a run's parameters to a version in small files: a job of steps that survives crashes."""
