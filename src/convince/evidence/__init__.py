"""Evidence: what the last run of each claim measured, one JSON file a paper."""
