"""Adapters after training: saving, loading, switching, merging, exporting and publishing them."""
