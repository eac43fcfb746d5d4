"""Layers with their second order written out."""
