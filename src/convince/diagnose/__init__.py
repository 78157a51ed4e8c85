"""Diagnosis: what a trained network looks at, and what its design made of it."""
