"""Recipes: reads and edits YAML, and opens the sources that it names."""
