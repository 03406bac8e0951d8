"""The training loop and what it leans on."""
