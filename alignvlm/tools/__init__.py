"""What a person runs to look or prepare."""
