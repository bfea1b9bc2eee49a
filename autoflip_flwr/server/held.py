"""Which mask each node holds, so that none is sent twice."""

from autoflip_flwr.wire import codec
from autoflip_flwr.wire.records import HELD, MASK, Phase, Plan

#: Masks of earlier rounds that a new one may be written within.
_REMEMBERED = 8


class HeldMasks:
    """The masks that nodes hold, by what they answered.

    A node that answered a message holds its mask. If it holds one that the new mask is
    within, the new one is sent as bits of the entries which that one keeps: none, if
    they are equal. A node that does not answer gets all of the next mask. If the
    message named a mask, the node may have lost it: none is named to it again.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._bits = b""
        self._digest = b""
        self._masks: dict[bytes, bytes] = {}  # digest -> packed mask, oldest first
        self._within: dict[bytes, bytes | None] = {}  # digest of a held mask -> bits
        self._holds: dict[int, bytes] = {}  # node -> digest
        self._asked: dict[int, tuple[bytes, bool]] = {}  # digest; was one named?
        self._forgetful: set[int] = set()

    def entries(self, node_id: int, plan: Plan, phase: Phase) -> dict[str, str | bytes]:
        """Return the entries of a message's config for a node."""
        self._prepare(plan)
        _, named = self._asked.get(node_id, (b"", False))
        if named:
            self._forgetful.add(node_id)
        held, bits = self._holds.pop(node_id, b""), None
        if held in self._masks and node_id not in self._forgetful:
            if held not in self._within:
                before = self._masks[held]
                self._within[held] = codec.pack_mask_within(self._bits, before)
            bits = self._within[held]
        entries = {MASK: self._bits}
        if bits is not None and len(held) + len(bits) < len(self._bits):
            # Flower cannot count an empty entry's bytes.
            entries = {HELD: held, **({MASK: bits} if bits else {})}
        self._asked[node_id] = self._digest, HELD in entries
        return plan.entries(phase, entries)

    def answered(self, node_id: int) -> None:
        """Note that a node has read the last message."""
        if node_id in self._asked:
            self._holds[node_id], _ = self._asked.pop(node_id)

    def _prepare(self, plan: Plan) -> None:
        if plan is self._plan:
            return
        self._plan, self._bits = plan, codec.pack_mask(plan.masks)
        self._digest = codec.digest(self._bits)
        self._within = {}
        self._masks.pop(self._digest, None)
        self._masks[self._digest] = self._bits
        while len(self._masks) > _REMEMBERED:
            del self._masks[next(iter(self._masks))]
