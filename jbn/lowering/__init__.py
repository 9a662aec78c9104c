"""Makes XLA compile the passes over memory well on each platform.

The only package that names a platform, a barrier or a compiler threshold. It holds no
mathematics: with `late.ENABLED` off, everything lowers to plain forms, which compute
the same more slowly.
"""
