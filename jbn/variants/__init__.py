"""The methods, one per file, each composed of the steps of batch norm."""
