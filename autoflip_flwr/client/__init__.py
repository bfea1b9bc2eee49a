"""The client's half: `AutoFlipMod` around an app, `masked` inside its training.

May import `units`, `wire`, `method`, `types` and `errors`, but nothing of a server.
"""
