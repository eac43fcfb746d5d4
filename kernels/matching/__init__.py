"""The matching loss of all pairs: its gradient, and the adjoint of that."""
