"""Training: the loop, one step, optimizers, checkpoints, output."""
