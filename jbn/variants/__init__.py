"""Methods of their own, one a file, each made of the pieces of batch norm."""
