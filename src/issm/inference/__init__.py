"""Exact inference: p(states | emissions, parameters)."""
