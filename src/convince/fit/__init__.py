"""The one training loop, its hooks and slots, state and checkpoints, precision, several processes."""
