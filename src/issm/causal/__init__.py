"""Causal questions asked of a fitted model."""
