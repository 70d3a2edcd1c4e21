"""Faster ways to compute the same training step on one machine."""
