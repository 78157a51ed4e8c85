"""Optimisers: how weights move."""
