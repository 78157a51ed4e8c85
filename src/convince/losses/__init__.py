"""Losses: from scores and labels to one number."""
