"""The model: loading, adapted layers, injection, packed attention, loss."""
