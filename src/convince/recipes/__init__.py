"""Recipes: applications, from a person's data to settings that train."""
