"""Names with wildcards: parses them, matches them, and writes many names as few patterns."""
