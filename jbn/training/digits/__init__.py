"""The digits of scikit-learn and UCI, shipped in the package, as a TFDS data set."""
