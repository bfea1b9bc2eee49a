"""The server's half: `AutoFLIP` around a strategy, on either of Flower's APIs.

`wrapper` has the constructor. A round goes through `intake` (exploration), `rounds`
(weights and mask), `replies` (what is dropped, how a round ends) and `diagnostics`.
`strategy` and `legacy` translate for the two APIs. `checkpoint` saves and resumes a
run; `tree` is its file format. May import `pruners`, `units`, `wire`,
`method`, `settings`, `types` and `errors`.
"""
