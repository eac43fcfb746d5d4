"""A reader for each layout that data sets have on disk."""
