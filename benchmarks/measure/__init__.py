"""How work is measured."""
