"""A run from its recipe: one iteration, the loop around it, evaluation, checkpoints and the record."""
