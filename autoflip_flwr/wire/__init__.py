"""The protocol: bytes, and Flower's records.

`codec` has the frames, `manifest` the names and shapes of their arrays, `records` the
record keys, `flower` the differences between versions of Flower. May import `method`,
`types` and `errors`; only `records` and `flower` import Flower.
"""
