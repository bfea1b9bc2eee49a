"""The server's half: `AutoFLIP` around a strategy, on either of Flower's APIs.

`strategy` and `legacy` translate for the two APIs; `wrapper` has their constructor,
`flow` the round that both go through: `intake` (exploration), `rounds` (weights and
mask), `replies` (what is dropped, how a round ends), `diagnostics`. `checkpoint` saves
and resumes a run; `tree` is its file format. May import `pruners`, `units`, `wire`,
`method`, `settings`, `types` and `errors`.
"""
