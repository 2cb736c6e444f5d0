"""Triton kernels of the fused residual blocks, installed as ``fastres.kernels``."""
