"""Recipe and sources become a plan."""
