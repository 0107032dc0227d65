"""What a model is: roles, fused groups, experts, by family."""
