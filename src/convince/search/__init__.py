"""Search: parts that look for a network inside a budget, and what they stand on."""
