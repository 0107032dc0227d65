"""mixprec: compile several checkpoints of one model into one whose weights keep the formats they came in."""

__version__ = "0.1.0"
