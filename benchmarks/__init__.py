"""Real models, real data and the commands that score them (run from the repository's root)."""
