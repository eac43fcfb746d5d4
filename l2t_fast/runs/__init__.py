"""Many trainings in one folder."""
