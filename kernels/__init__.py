"""Triton kernels, imported as `fastvid.kernels`: they know tensors, and nothing else of fastvid.

A file holds one operation: what it computes, its kernel, and one typed wrapper that checks the layout and launches.
"""
