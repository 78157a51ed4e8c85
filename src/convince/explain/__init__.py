"""Explainers: why an answer was given."""
