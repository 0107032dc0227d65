"""Helpers for tests with the real SGLang: models and layers in this process, servers in another."""
