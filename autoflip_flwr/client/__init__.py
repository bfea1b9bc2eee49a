"""The client's half: `AutoFlipMod` around an app, `masked` inside its training.

May import `units`, `wire`, `method`, `types` and `errors`: nothing that only a server
needs.
"""
