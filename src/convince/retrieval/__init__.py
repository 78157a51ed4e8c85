"""Retrieval: embeddings in which near means alike."""
