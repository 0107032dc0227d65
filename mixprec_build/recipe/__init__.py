"""Recipes: read, written, their sources opened."""
