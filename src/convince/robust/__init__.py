"""Robustness: attacks, shifts, and answers that withstand them."""
