"""A checkpoint reaches the model's parameters, whole."""
