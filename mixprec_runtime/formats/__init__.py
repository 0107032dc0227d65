"""How SGLang serves each storage format: one file for each, with the same name as in ``mixprec_build.formats``."""
