"""Data sets and images to records, mixed in token shares."""
