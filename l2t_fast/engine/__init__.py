"""One iteration, exact."""
