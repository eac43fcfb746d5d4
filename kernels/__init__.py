"""Operators with their derivatives written out, installed as `l2t_fast.kernels`: a folder each.

`matching` the matching loss of all pairs, `layers` convolution and BatchNorm, `sgd` the SGD step. In each the formulas
in ATen stand beside the Triton kernels that compute them on CUDA.
"""
