"""SGLang plugin that serves what `mixprec build` compiles. SGLang finds it by its entry point, ``plugin.register``."""
