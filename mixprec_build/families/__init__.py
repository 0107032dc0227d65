"""Model families: roles of modules, fused groups, experts."""
