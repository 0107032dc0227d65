"""How SGLang serves each storage format: one file a format, of the same name as the compiler's."""
