"""Storage formats of a module: one file each, found through :mod:`.registry`."""
