"""The table of networks: what each is, what it costs, and what it reaches under one common budget."""
