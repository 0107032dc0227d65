"""MoE layers whose experts are stored in several formats."""
