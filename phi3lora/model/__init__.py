"""The model: loading, packed attention, the decoder layers' backends, loss, memory estimates."""
