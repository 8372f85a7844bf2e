"""Mutation tests of the CUDA kernels, as their host builds run them."""
