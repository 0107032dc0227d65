"""Facts, tables, pictures; what this machine can serve."""
