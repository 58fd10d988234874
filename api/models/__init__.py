"""Weights on disk: what is installed, where, and what its configuration says. No torch."""
