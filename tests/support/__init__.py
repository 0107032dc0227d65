"""What tests share: models and checkpoints in small, packers of formats, runners, servers. tests/README.md is a map."""
