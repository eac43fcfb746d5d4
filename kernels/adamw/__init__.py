"""The AdamW step of all parameters, and its adjoint."""
