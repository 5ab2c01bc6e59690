"""Weights as linear maps: matrices in blocks, and convolutions on inputs of a given size."""
