"""What is learned: imported by trainers, export and simulations, never by the daemon (but spec)."""
