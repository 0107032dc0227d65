"""A plan becomes files; files are cut and compared."""
