"""Data quality: hard, mislabelled and unequal data, and what to do about it."""
