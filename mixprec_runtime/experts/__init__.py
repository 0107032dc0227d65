"""MoE layers whose experts have several formats."""
