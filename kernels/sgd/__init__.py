"""The SGD step of all parameters, and its adjoint."""
