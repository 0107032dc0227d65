"""Compares SGLang's kernels with float64 arithmetic on a checkpoint's own weights: a canary before a server starts.

:mod:`.choice` picks one small product for each format and way of mixing them, :mod:`.product` makes SGLang's layer for
it and multiplies. ``mixprec doctor --kernels out/`` runs it, and a server with ``MIXPREC_CANARY=1`` before it loads.
"""
