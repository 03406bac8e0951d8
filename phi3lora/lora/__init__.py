"""LoRA layers on frozen base weights, and the injection that swaps them into a model."""
