"""Norms of layers and a bound for the network, each with its certificate."""
