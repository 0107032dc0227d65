"""SGLang plugin that serves checkpoints of `mixprec build`; its entry point is ``plugin.register``."""
