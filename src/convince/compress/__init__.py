"""Compressors: smaller networks, and what they cost in accuracy and time."""
