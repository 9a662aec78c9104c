"""What is computed over memory: definitions that read like their formulas."""
