"""Augmentations: what changes training images and their labels, a batch at a time."""
