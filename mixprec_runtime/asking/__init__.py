"""SGLang's class for a model, asked what it makes of a checkpoint."""
