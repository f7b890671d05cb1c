"""What coordinator and agents must agree on; no web, no database, and no torch outside tasks."""
