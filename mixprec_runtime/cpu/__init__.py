"""Serving on machines without a GPU, for trying and testing."""
