"""Ensembles: answers made of several networks."""
