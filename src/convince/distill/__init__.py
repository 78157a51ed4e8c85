"""Distill: a network learns from another network, its answers or its inner representations."""
