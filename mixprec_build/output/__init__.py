"""Writes the files of a plan, cuts them for ranks, and compares them with their sources."""
