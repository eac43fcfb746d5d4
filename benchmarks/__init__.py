"""Measurements: every time stands beside a reference in the same run, and behind a check of exactness."""
