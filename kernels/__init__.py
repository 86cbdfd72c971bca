"""Triton kernels, imported as `fastvid.kernels`: they know tensors, and nothing else of fastvid."""
