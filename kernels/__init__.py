"""Operators of the matching loss, installed as `l2t_fast.kernels`."""
