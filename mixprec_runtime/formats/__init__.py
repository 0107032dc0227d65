"""Each storage format as SGLang's own quantization methods run it."""
