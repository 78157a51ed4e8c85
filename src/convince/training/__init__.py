"""Training: small techniques without a paper."""
