"""Pretraining: stages that need no labels, before the main training."""
