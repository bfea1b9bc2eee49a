"""The paper's method on named NumPy arrays: guidance, scores, masks.

Eq. 2 and 3 are in `guidance`, scores in `scores`, Eq. 4 in `mask`. `structured` prunes
whole units, `schedule` lowers the density over the rounds, `agreement` refines a mask,
`privacy` adds noise to guidance, `outliers` finds clients that are far from the others.
May import `types` and `errors`; needs only NumPy.
"""
