"""Layers: drop-in modules, edited into networks that exist."""
