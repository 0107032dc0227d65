"""Finds how SGLang's own class for a model loads the tensors of a checkpoint."""
