"""The server's half: `AutoFLIP` around a strategy, on either of Flower's APIs.

`wrapper` holds the constructor. A round goes through `intake` (who explores, what
becomes of it), `rounds` (weights and mask), `replies` (what is dropped, how a round
ends) and `diagnostics`; `strategy` and `legacy` translate for the two APIs.
`checkpoint` (files: `tree`) goes on with a run. May import `pruners`, `units`, `wire`,
`method`, `settings`, `types` and `errors`.
"""
