"""Triton kernels for a decoder layer, one file a kernel with its backward; decoder.py is the way in."""
