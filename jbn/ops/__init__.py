"""The passes over memory, defined by their formulas."""
