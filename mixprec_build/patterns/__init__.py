"""Names with wildcards: parsed, matched, folded."""
