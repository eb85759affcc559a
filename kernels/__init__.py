"""Triton kernels: one op a file. They allocate and launch; checks, autograd and the choice of a backend are elsewhere.

Tall matrices are stacks (L, rows, r) with a batch and a row stride and unit column stride; small ones (L, r, r) are
contiguous. Offsets are int64. Ranks that are no multiple of a tile are masked.
"""
