"""Makes a plan from a recipe and its sources."""
