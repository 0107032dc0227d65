"""Chooses a source for every module within a budget."""
