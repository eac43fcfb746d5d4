"""What came out, read from files alone."""
