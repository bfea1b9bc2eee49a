"""Frames <-> Flower records, and every record key of the protocol.

A message of AutoFLIP is one of Flower's own: a single ArrayRecord and a single
ConfigRecord, so any strategy can sit inside and any ClientApp outside. Entries of
ours start with ``autoflip.``. docs/wire-format.md shows them on one screen.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.errors import WireError
from autoflip_flwr.types import Array, Masks, Measure, Params, ValueType
from autoflip_flwr.wire import codec
from autoflip_flwr.wire.manifest import Entry, Manifest

Phase: TypeAlias = Literal["explore", "train", "evaluate"]

PREFIX = "autoflip."

# Entries of the ConfigRecord of a message to a client.
PHASE = "autoflip.phase"
MANIFEST = "autoflip.manifest"
MASK = "autoflip.mask"
VALUE_TYPE = "autoflip.value-type"
EPOCHS = "autoflip.epochs"  # exploration: at most so many; in the reply: done
PATIENCE = "autoflip.patience"
MEASURE = "autoflip.measure"  # exploration: of what the reply's frame tells
EPOCH = "autoflip.epoch"  # exploration: set by the mod before each call of the app

# Entries of an ArrayRecord, either way.
VALUES = "autoflip.values"
GUIDANCE = "autoflip.guidance"
SIGNS = "autoflip.signs"  # exploring for a warm start


#: In the config of the reply to a roll call: a name, or the number of a partition; -1:
#: the node does not say who it is.
CLIENT_ID = "client-id"

_RAW = "autoflip.raw"  # serialization type: the bytes of a frame, without a header
_REAL = "biuf"  # numpy kinds


@dataclass(frozen=True, slots=True)
class Plan:
    """What server and client agree on for one message: model, mask, value type."""

    manifest: Manifest
    masks: Masks
    values: ValueType = "float32"

    def entries(self, phase: Phase) -> dict[str, str | bytes]:
        """Return the ConfigRecord's entries that tell a client of this plan."""
        return {
            PHASE: phase,
            MANIFEST: self.manifest.to_bytes(),
            MASK: codec.pack_mask(self.masks),
            VALUE_TYPE: self.values,
        }

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Plan":
        """Read a plan out of a config; a bad entry is a WireError."""
        manifest = manifest_of(config)
        values = _required(config, VALUE_TYPE, str)
        if values not in codec.VALUE_TYPES:
            raise WireError(
                f"{VALUE_TYPE}: expected one of {list(codec.VALUE_TYPES)}, "
                f"got {values!r}"
            )
        masks = codec.unpack_mask(_required(config, MASK, bytes), manifest.shapes)
        return cls(manifest, masks, cast(ValueType, values))

    def keeps(self) -> list[NDArray[np.bool_]]:
        """Return a bool array per trainable parameter, in the model's order."""
        return [
            self.masks[e.name] if e.masked else np.ones(e.shape, np.bool_)
            for e in self.manifest.entries
            if e.trainable
        ]

    def pack(self, arrays: Params) -> ArrayRecord:
        """Return what travels: the kept values as one array, the rest by name."""
        kept = {name: arrays[name] for name in self.masks}
        frame = codec.encode(kept, self.masks, dtype=self.values)
        record = {VALUES: _raw(frame, self.values)}
        for entry in self.manifest.entries:
            if not entry.masked:
                record[entry.name] = FlowerArray(np.asarray(arrays[entry.name]))
        return ArrayRecord(record)

    def unpack(
        self, record: ArrayRecord, *, fill: Params | None = None
    ) -> dict[str, Array]:
        """Return all arrays by name, in the manifest's order.

        Parameters
        ----------
        record : ArrayRecord
            As `pack` wrote it.
        fill : mapping of name -> array, optional
            What pruned entries become; zeros by default.

        Raises
        ------
        WireError
            Keys, length, type or shape are not the plan's, or a value is NaN or
            infinite.
        """
        dense_names = [e.name for e in self.manifest.entries if not e.masked]
        expected = {VALUES, *dense_names}
        if set(record) != expected:
            raise WireError(
                f"expected the arrays {sorted(expected)}, got {sorted(record)}"
            )
        like = fill or {
            entry.name: np.zeros(entry.shape, entry.dtype)
            for entry in self.manifest.entries
            if entry.masked
        }
        frame = _frame(record[VALUES], self.values)
        kept = codec.decode(frame, self.masks, dtype=self.values, fill=like)
        return {
            entry.name: kept[entry.name]
            if entry.masked
            else read_array(record[entry.name], entry)
            for entry in self.manifest.entries
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """What a client is asked to explore.

    Attributes
    ----------
    manifest : Manifest
    plan : Plan or None
        How the weights it starts from are packed; None: dense.
    epochs, patience : int
        At most so many epochs, and without a lower loss so many; each >= 1.
    measure : Measure
        What the reply's frame tells of each parameter.
    """

    manifest: Manifest
    plan: Plan | None = None
    epochs: int = 1
    patience: int = 1
    measure: Measure = "deviation"

    def entries(self) -> dict[str, str | bytes | int]:
        """Return the ConfigRecord's entries that tell a client of it."""
        packed = self.plan.entries("explore") if self.plan else {}
        return {
            **packed,
            PHASE: "explore",
            MANIFEST: self.manifest.to_bytes(),
            EPOCHS: self.epochs,
            PATIENCE: self.patience,
            MEASURE: self.measure,
        }

    def pack(self, arrays: Params) -> ArrayRecord:
        """Return the weights to start from as they travel."""
        return self.plan.pack(arrays) if self.plan else record_of(arrays)

    def unpack(self, record: ArrayRecord) -> dict[str, Array]:
        """Return the weights to start from, dense, by name."""
        if self.plan is None:
            return named_arrays(record, self.manifest)
        return self.plan.unpack(named(record, self.plan))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Exploration":
        """Read it out of a config; a bad entry is a WireError."""
        epochs, patience = _exploration_of(config)
        measure = _required(config, MEASURE, str)
        if measure not in get_args(Measure):
            raise WireError(
                f"{MEASURE}: expected one of {list(get_args(Measure))}, got {measure!r}"
            )
        return cls(
            manifest=manifest_of(config),
            plan=Plan.of(config) if MASK in config else None,
            epochs=epochs,
            patience=patience,
            measure=cast(Measure, measure),
        )


def _exploration_of(config: Mapping[str, Any]) -> tuple[int, int]:
    epochs = _required(config, EPOCHS, int)
    patience = _required(config, PATIENCE, int)
    if epochs < 1 or patience < 1:
        raise WireError(
            f"expected {EPOCHS} and {PATIENCE} >= 1, got {epochs} and {patience}"
        )
    return epochs, patience


def config_of(message: Message) -> ConfigRecord:
    """Return the config that carries our entries, or an empty one."""
    if message.has_content():
        for config in message.content.config_records.values():
            if PHASE in config:
                return config
    return ConfigRecord()


def phase_of(config: Mapping[str, Any]) -> Phase | None:
    """Return the phase of a message's config; None: the message is not ours."""
    if PHASE not in config:
        return None
    phase = config[PHASE]
    if phase not in ("explore", "train", "evaluate"):
        raise WireError(f"{PHASE}: expected explore, train or evaluate, got {phase!r}")
    return cast(Phase, phase)


def manifest_of(config: Mapping[str, Any]) -> Manifest:
    """Return the manifest in a message's config."""
    return Manifest.from_bytes(_required(config, MANIFEST, bytes))


def guidance_record(frame: bytes, signs: bytes | None = None) -> ArrayRecord:
    """Wrap what an explorer found for the way to the server."""
    arrays = {GUIDANCE: _raw(frame, "uint8")}
    if signs is not None:
        arrays[SIGNS] = _raw(signs, "uint8")
    return ArrayRecord(arrays)


def guidance_frames(record: ArrayRecord) -> tuple[bytes, bytes | None]:
    """Return the guidance frame of an exploration reply, and the signs' if sent."""
    if set(record) not in ({GUIDANCE}, {GUIDANCE, SIGNS}):
        raise WireError(
            f"expected the array [{GUIDANCE!r}], for a warm start {SIGNS!r} too, "
            f"got {sorted(record)}"
        )
    signs = _frame(record[SIGNS], "uint8") if SIGNS in record else None
    return _frame(record[GUIDANCE], "uint8"), signs


def read_array(array: FlowerArray, entry: Entry, *, exact: bool = True) -> Array:
    """Read a dense array whose shape and type are known.

    The header is compared before anything is allocated, and nothing is unpickled.
    """
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise WireError(f"{entry.name}: expected npy version (1, 0), got {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except WireError:
        raise
    except Exception as error:  # the parser raises whatever a hostile text provokes
        raise WireError(f"{entry.name}: expected an npy array, {error}") from error
    right = dtype == np.dtype(entry.dtype) if exact else dtype.kind in _REAL
    if shape != entry.shape or not right:
        raise WireError(
            f"{entry.name}: expected {entry.dtype}{list(entry.shape)}, "
            f"got {dtype.str}{list(shape)}"
        )
    body = memoryview(array.data)[stream.tell() :]
    if len(body) != entry.size * dtype.itemsize:
        raise WireError(
            f"{entry.name}: expected {entry.size * dtype.itemsize} B "
            f"({dtype.itemsize} x {entry.size}), got {len(body)} B"
        )
    values: NDArray[Any] = np.frombuffer(body, dtype).reshape(
        entry.shape, order="F" if fortran else "C"
    )
    return _converted(values, entry)


def _converted(values: NDArray[Any], entry: Entry) -> Array:
    """Return finite values as the entry's type, or refuse them."""
    wanted = np.dtype(entry.dtype)
    if wanted.kind in "iu" and values.dtype.kind == "f":
        limits = np.iinfo(wanted)
        inside = (values >= limits.min) & (values <= limits.max)
        if not inside.all():
            raise WireError(f"{entry.name}: expected values of {wanted}, got others")
        whole: Array = np.rint(values).astype(wanted)
        return whole
    with np.errstate(over="ignore"):
        converted: Array = values.astype(wanted, copy=False)
    if wanted.kind in "fc" and not np.isfinite(converted).all():
        raise WireError(
            f"{entry.name}: expected finite values of {wanted}, got NaN or Inf"
        )
    return converted


def arrays_of(record: ArrayRecord) -> dict[str, Array]:
    """Return read-only views of a dense record's arrays, without copying them."""
    return {
        name: read_array(
            array, Entry(name, tuple(array.shape), _type_text(array.dtype), False)
        )
        for name, array in record.items()
    }


def _type_text(dtype: str) -> str:
    """Return numpy's short text of a type that Flower names in full (``float32``)."""
    try:
        return np.dtype(dtype).str if dtype else ""
    except (TypeError, SyntaxError, ValueError):
        return dtype


def record_of(arrays: Params) -> ArrayRecord:
    """Return a dense record of named arrays."""
    return ArrayRecord({n: FlowerArray(np.asarray(v)) for n, v in arrays.items()})


def named(record: ArrayRecord, plan: Plan) -> ArrayRecord:
    """Return a packed record with its proper keys.

    Flower's older API numbers arrays and drops their types; the order tells.
    """
    if VALUES in record or list(record) != [str(i) for i in range(len(record))]:
        return record
    names = [VALUES, *(e.name for e in plan.manifest.entries if not e.masked)]
    if len(names) != len(record):
        raise WireError(f"expected {len(names)} arrays {names}, got {len(record)}")
    arrays = dict(zip(names, record.values(), strict=True))
    arrays[VALUES] = _raw(arrays[VALUES].data, plan.values)
    return ArrayRecord(arrays)


def named_arrays(
    record: ArrayRecord, manifest: Manifest, *, exact: bool = True
) -> dict[str, Array]:
    """Read a dense record that has the manifest's names, or their number.

    With ``exact=False`` other numeric types than the manifest's are converted.
    """
    names = [entry.name for entry in manifest.entries]
    numbers = [str(index) for index in range(len(names))]
    if set(record) != set(names) and list(record) != numbers:
        raise WireError(f"expected the arrays {names}, got {list(record)}")
    keys = names if set(record) == set(names) else numbers
    return {
        entry.name: read_array(record[key], entry, exact=exact)
        for key, entry in zip(keys, manifest.entries, strict=True)
    }


def only_array_record(content: RecordDict) -> tuple[str, ArrayRecord]:
    """Return key and value of a message's single ArrayRecord."""
    if len(content.array_records) != 1:
        raise WireError(
            "expected exactly one ArrayRecord, got "
            f"{sorted(content.array_records) or 'none'}"
        )
    return next(iter(content.array_records.items()))


def only_config(content: RecordDict) -> tuple[str, ConfigRecord]:
    """Return key and value of a message's single ConfigRecord."""
    if len(content.config_records) != 1:
        raise WireError(
            "expected exactly one ConfigRecord, got "
            f"{sorted(content.config_records) or 'none'}"
        )
    return next(iter(content.config_records.items()))


def count_bytes(content: RecordDict) -> int:
    """Return the bytes of all records of a message, as Flower counts them."""
    return sum(_record_bytes(record) for record in content.values())


def own_bytes(content: RecordDict) -> int:
    """Return the bytes of a message that plain FedAvg would not send.

    All of the arrays, which FedAvg sends dense, and our entries of the config.
    """
    ours = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            ours += record.count_bytes()
        else:
            own = {k: v for k, v in record.items() if k.startswith(PREFIX)}
            ours += _record_bytes(ConfigRecord(cast(Any, own)))
    return ours


def _record_bytes(record: Any) -> int:
    return int(record.count_bytes()) if len(record) else 0


def _raw(frame: bytes, dtype: str) -> FlowerArray:
    size = len(frame) // np.dtype(dtype).itemsize
    return FlowerArray(dtype=dtype, shape=(size,), stype=_RAW, data=frame)


def _frame(array: FlowerArray, dtype: str) -> bytes:
    if array.stype != _RAW or array.dtype != dtype:
        raise WireError(
            f"expected an array of {dtype} serialized as {_RAW!r}, "
            f"got {array.dtype!r} as {array.stype!r}"
        )
    return array.data


def _required(config: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = config.get(key)
    if not isinstance(value, kind):
        raise WireError(
            f"{key}: expected {kind.__name__} in the message's config, "
            f"got {type(value).__name__}"
        )
    return value
