"""Stand-ins for machines without a GPU."""
