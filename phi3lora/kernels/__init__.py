"""A decoder layer in few passes over memory: Triton kernels, one file a pass, each with its own backward."""
