"""An opened checkpoint, each module with its format; what a compiled one declares."""
