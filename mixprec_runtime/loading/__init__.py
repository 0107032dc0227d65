"""Loads a checkpoint into a model's parameters, and checks that it is complete."""
