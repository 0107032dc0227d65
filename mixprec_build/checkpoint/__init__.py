"""Opens checkpoints and detects the format of each module; declaration and manifest of compiled ones."""
