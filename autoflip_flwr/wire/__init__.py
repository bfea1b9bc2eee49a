"""Bytes and Flower's records: what travels, and how it is read back.

`codec` has the frames, `manifest` the names and shapes they leave out, `records` every
record key of the protocol, `flower` what differs between versions of Flower. May import
`method`, `types` and `errors`; only `records` and `flower` know Flower.
"""
