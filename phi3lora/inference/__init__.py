"""Using a model: evaluation and chat generation."""
