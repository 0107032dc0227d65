"""A checkpoint cut for ranks, and put together again."""
