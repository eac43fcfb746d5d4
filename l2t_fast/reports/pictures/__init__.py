"""What came out, drawn: a file for each kind of picture."""
