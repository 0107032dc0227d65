"""Helpers that tests share: small checkpoints, packers of formats, runners, servers. tests/README.md lists them."""
