"""Checkpoints: their tensors, read without executing anything, and the weights as they act."""
