"""Cuts checkpoints for ranks, and puts merged files together again."""
