"""The passes over memory. `xla.py` defines them; kernels would stand beside it."""
