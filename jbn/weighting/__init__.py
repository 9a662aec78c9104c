"""Which rows count, and how much: weights for the functions that take them."""
