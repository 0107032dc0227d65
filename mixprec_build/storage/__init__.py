"""Bytes: safetensors headers, files, folders, the hub."""
