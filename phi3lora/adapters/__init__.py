"""Save, load, switch, merge, export and publish adapters."""
