"""How XLA is made to compile the passes over memory well, by platform.

The only package that names a platform, a barrier or a threshold of a compiler. It holds
no mathematics: with `late.ENABLED` off, all of it lowers to the plain forms, which give
the same numbers more slowly.
"""
