"""Frames <-> Flower records, and all record keys of the protocol.

A message has one ArrayRecord and one ConfigRecord, as Flower's own messages do, so any
strategy and any ClientApp can be used. Our keys start with ``autoflip.``;
docs/wire-format.md lists them.
"""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from autoflip_flwr.errors import MaskError, WireError
from autoflip_flwr.types import Array, Masks, Measure, Params, ValueType
from autoflip_flwr.wire import codec
from autoflip_flwr.wire.manifest import Entry, Manifest

Phase: TypeAlias = Literal["explore", "train", "evaluate"]
R = TypeVar("R")

PREFIX = "autoflip."

# Entries of the ConfigRecord of a message to a client.
PHASE = "autoflip.phase"
ARRAYS = "autoflip.arrays"  # the model's ArrayRecord, where there are several
MANIFEST = "autoflip.manifest"
MASK = "autoflip.mask"
HELD = "autoflip.mask-held"  # digest of a mask that the client holds
VALUE_TYPE = "autoflip.value-type"
EPOCHS = "autoflip.epochs"  # exploration: the maximum; in the reply: the number done
PATIENCE = "autoflip.patience"
MEASURE = "autoflip.measure"  # exploration: the content of the reply's frame
START = "autoflip.start"  # exploration: digest of weights that the client builds
EPOCH = "autoflip.epoch"  # exploration: set by the mod before each call of the app

# Entries of an ArrayRecord, in both directions.
VALUES = "autoflip.values"
GUIDANCE = "autoflip.guidance"
SIGNS = "autoflip.signs"  # exploration with a warm start
MOVED = "autoflip.moved"  # in a reply: the share of pruned entries that training moved

#: In the reply to a roll call: a name, or the number of a partition; -1: unknown.
CLIENT_ID = "client-id"

#: What a client says that answers without our mod.
NO_MOD = (
    "the client's app does not answer as AutoFlipMod does: "
    "ClientApp(mods=[AutoFlipMod()])"
)

RAW = "autoflip.raw"  # serialization type: a frame without a header
_REAL = "biuf"  # numpy kinds
_NPY_HEADER = 1024  # bytes; that of an array with 64 dimensions has 640


@dataclass(frozen=True, slots=True)
class Plan:
    """How one message is packed: model, mask and value type."""

    manifest: Manifest
    masks: Masks
    values: ValueType = "float32"
    #: Of the masks; None: found for each message, which takes no memory in between.
    kept: codec.Indices | None = field(default=None, compare=False, repr=False)

    def entries(
        self, phase: Phase, mask: Mapping[str, bytes] | None = None
    ) -> dict[str, str | bytes]:
        """Return the entries of the ConfigRecord that describe this plan.

        `mask` are those of the mask for a client that holds one; all of it by default.
        """
        return {
            PHASE: phase,
            MANIFEST: self.manifest.to_bytes(),
            VALUE_TYPE: self.values,
            **({MASK: codec.pack_mask(self.masks)} if mask is None else mask),
        }

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Plan":
        """Read a plan from a config; a bad entry is a WireError."""
        manifest = manifest_of(config)
        values = _choice(config, VALUE_TYPE, codec.VALUE_TYPES)
        masks = codec.unpack_mask(_required(config, MASK, bytes), manifest.shapes)
        return cls(manifest, masks, cast(ValueType, values))

    @property
    def relative(self) -> bool:
        """Whether replies tell how far the weights moved from those received.

        Rounding is then relative to the update, and the rounding of what was sent does
        not enter the server's weights.
        """
        return self.values in ("int8", "int4")

    @property
    def down(self) -> ValueType:
        """The type of the values to a client: four bits are for updates alone."""
        return "int8" if self.values == "int4" else self.values

    def pack(self, arrays: Params, *, dtype: ValueType | None = None) -> ArrayRecord:
        """Return the record to send: kept values as one array, other arrays by name."""
        kept, dtype = {name: arrays[name] for name in self.masks}, dtype or self.down
        frame = codec.encode(kept, self.masks, dtype=dtype, kept=self.kept)
        record = {VALUES: _raw(frame, dtype)}
        for entry in self.manifest.whole:
            record[entry.name] = FlowerArray(np.asarray(arrays[entry.name]))
        return ArrayRecord(record)

    def pack_reply(
        self, trained: Params, received: Params, held: Collection[str] = ()
    ) -> ArrayRecord:
        """Pack what a client trained, or how far it is from what it received.

        If pruned entries are not zero, but for the masks of the names `held`, their
        share goes along (`take_moved`).
        """
        self._check_tied(trained)
        packed = trained
        if self.relative:
            update = {name: trained[name] - received[name] for name in self.masks}
            packed = {**trained, **update}
        record = self.pack(packed, dtype=self.values)
        if moved := self._moved(trained, held):
            record[MOVED] = _raw(np.float32(moved).tobytes(), "float32")
        return record

    def _check_tied(self, trained: Params) -> None:
        """Refuse a weight that the app has trained as two, one of which is not sent.

        What a mod adds to each name, such as noise, is not the app's: it moves pruned
        entries, too.
        """
        for entry in self.manifest.entries:
            keep = self.masks.get(entry.of)
            if keep is None or keep.all():
                continue
            both = trained[entry.of], trained[entry.name]
            if not np.array_equal(*both) and not any(e[~keep].any() for e in both):
                raise MaskError(
                    f"{entry.name} is {entry.of} in the server's model, one weight; "
                    "the app trains two: tie them in the app's model, too, or give the "
                    "strategy a model that does not"
                )

    def _moved(self, trained: Params, held: Collection[str]) -> float:
        """Return the share of the pruned entries that are not zero.

        Of a tied weight, which comes under several names, one mask has been kept.
        """
        moved = {
            name: int(np.count_nonzero((trained[name] != 0) > keep))
            for name, keep in self.masks.items()
            if name not in held
        }
        still = [name for name in self.masks if not moved.get(name)]
        total = sum(
            count
            for name, count in moved.items()
            if count
            and not any(np.array_equal(trained[name], trained[n]) for n in still)
        )
        pruned = sum(k.size - int(np.count_nonzero(k)) for k in self.masks.values())
        return total / max(1, pruned)

    def unpack_reply(self, record: ArrayRecord, own: Params) -> dict[str, Array]:
        """Return a reply's arrays; pruned entries have the values of `own`.

        `own` are the server's arrays; see `unpack` for the errors.
        """
        if VALUES not in record:
            raise WireError(NO_MOD)
        if not self.relative:
            return self.unpack(record, fill=own)
        arrays = self.unpack(record, dtype=self.values)
        for name in self.masks:
            with np.errstate(over="ignore"):
                arrays[name] += own[name]  # in place: under all names of the weight
            if not np.isfinite(arrays[name]).all():
                raise WireError(f"{name}: expected an update to finite values")
        return arrays

    def update(self, sent: bytes, received: bytes) -> Array:
        """Return a client's update of the kept values, flat, float32."""
        counts = [int(np.count_nonzero(keep)) for keep in self.masks.values()]
        values = codec.flat(received, counts, dtype=self.values).astype(np.float32)
        if not self.relative:
            with np.errstate(over="ignore", invalid="ignore"):  # any value may come
                values -= codec.flat(sent, counts, dtype=self.values)
        return values

    def unpack(
        self,
        record: ArrayRecord,
        *,
        fill: Params | None = None,
        dtype: ValueType | None = None,
    ) -> dict[str, Array]:
        """Return all arrays of a packed record by name, in the manifest's order.

        `fill` has the values of the pruned entries, zeros by default; `dtype` is the
        type of the values, by default that of messages to a client. It is a WireError
        if keys, lengths, types or shapes differ from the plan, or a value is NaN or
        infinite.
        """
        entries, whole = self.manifest.entries, self.manifest.whole
        expected = {VALUES, *(e.name for e in whole)}
        if set(record) != expected:
            raise WireError(
                f"expected the arrays {sorted(expected)}, got {sorted(record)}"
            )
        zeros = {e.name: np.zeros(e.shape, e.dtype) for e in entries if e.masked}
        dtype = dtype or self.down
        frame = _frame(record[VALUES], dtype)
        masked = codec.decode(
            frame, self.masks, dtype=dtype, fill=fill or zeros, kept=self.kept
        )
        dense = {e.name: read_array(record[e.name], e) for e in whole}
        return self.manifest.tied({**masked, **dense})


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """A request to a client to explore."""

    manifest: Manifest
    plan: Plan | None = None  # how the initial weights are packed; None: dense
    epochs: int = 1  # at most, >= 1
    patience: int = 1  # epochs without a lower loss before it stops, >= 1
    measure: Measure = "deviation"  # the content of the reply's frame
    start: bytes | None = None  # digest of weights that the client builds; none travel

    def entries(self) -> dict[str, str | bytes | int]:
        """Return the entries of the ConfigRecord that describe this request."""
        packed = self.plan.entries("explore") if self.plan else {}
        return {
            **packed,
            PHASE: "explore",
            MANIFEST: self.manifest.to_bytes(),
            EPOCHS: self.epochs,
            PATIENCE: self.patience,
            MEASURE: self.measure,
            **({START: self.start} if self.start else {}),
        }

    def pack(self, arrays: Params) -> ArrayRecord:
        """Return the record of the initial weights."""
        if self.start:
            return ArrayRecord()
        if self.plan:
            return self.plan.pack(arrays)
        return record_of(
            {e.name: arrays[e.name] for e in self.manifest.distinct.entries}
        )

    def unpack(self, record: ArrayRecord) -> dict[str, Array]:
        """Return the initial weights, dense, by name."""
        if self.plan is None:
            arrays = named_arrays(record, self.manifest.distinct)
            return self.manifest.tied(arrays)
        return self.plan.unpack(named(record, self.plan))

    def built(self, record: ArrayRecord) -> dict[str, Array]:
        """Return the initial weights that a client has built, by name.

        They are the server's, bit for bit; others are a WireError.
        """
        arrays = named_arrays(record, self.manifest)
        if self.manifest.digest(arrays) != self.start:
            raise WireError(
                "expected start weights that equal the server's, bit for bit, got "
                "others (another seed, checkpoint or version?)"
            )
        return self.manifest.tied(arrays)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Exploration":
        """Read a request from a config; a bad entry is a WireError."""
        epochs = _required(config, EPOCHS, int)
        patience = _required(config, PATIENCE, int)
        if epochs < 1 or patience < 1:
            raise WireError(
                f"expected {EPOCHS} and {PATIENCE} >= 1, got {epochs} and {patience}"
            )
        measure = _choice(config, MEASURE, get_args(Measure))
        return cls(
            manifest=manifest_of(config),
            plan=Plan.of(config) if MASK in config else None,
            epochs=epochs,
            patience=patience,
            measure=cast(Measure, measure),
            start=_required(config, START, bytes) if START in config else None,
        )


def complete_mask(config: ConfigRecord, state: RecordDict) -> None:
    """Write all of the mask into a message's config, and hold it in `context.state`.

    A server names a mask that this client holds instead of sending it again. It is a
    WireError if the client does not hold it, or the rest does not fit it.
    """
    if HELD in config:
        held = state.config_records.get(HELD, ConfigRecord()).get(MASK)
        if not isinstance(held, bytes) or codec.digest(held) != config[HELD]:
            raise WireError(
                "the server named a mask that this client does not hold (it has been "
                "started again?); the next message has all of it"
            )
        within = _required(config, MASK, bytes) if MASK in config else b""
        config[MASK] = codec.unpack_mask_within(within, held)
        del config[HELD]
    state[HELD] = ConfigRecord({MASK: _required(config, MASK, bytes)})


def config_of(message: Message) -> ConfigRecord:
    """Return the config with our entries, or an empty one."""
    if message.has_content():
        for config in message.content.config_records.values():
            if PHASE in config:
                return config
    return ConfigRecord()


def phase_of(config: Mapping[str, Any]) -> Phase | None:
    """Return the phase in a message's config; None if the message is not ours."""
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
    """Return the record with an explorer's frames."""
    arrays = {GUIDANCE: _raw(frame, "uint8")}
    if signs is not None:
        arrays[SIGNS] = _raw(signs, "uint8")
    return ArrayRecord(arrays)


def guidance_frames(record: ArrayRecord) -> tuple[bytes, bytes | None]:
    """Return the guidance frame of an exploration reply, and its signs or None."""
    if list(record) in (["0"], ["0", "1"]):  # from Flower's older API
        record = guidance_record(*(array.data for array in record.values()))
    if set(record) not in ({GUIDANCE}, {GUIDANCE, SIGNS}):
        if GUIDANCE not in record:
            raise WireError(NO_MOD)
        raise WireError(
            f"expected the array [{GUIDANCE!r}], and {SIGNS!r} for a warm start, "
            f"got {sorted(record)}"
        )
    signs = _frame(record[SIGNS], "uint8") if SIGNS in record else None
    return _frame(record[GUIDANCE], "uint8"), signs


def read_array(array: FlowerArray, entry: Entry, *, exact: bool = True) -> Array:
    """Read a dense array of known shape and type.

    The header is checked before any allocation, and nothing is unpickled.
    """
    stream = io.BytesIO(array.data[:_NPY_HEADER])  # a hostile length reads no more
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise WireError(f"{entry.name}: expected npy version (1, 0), got {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except WireError:
        raise
    except Exception as error:  # a hostile header can raise any error
        raise WireError(f"{entry.name}: expected an npy array, {error}") from error
    right = dtype == np.dtype(entry.dtype) or (not exact and dtype.kind in _REAL)
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
    """Convert finite values to the entry's type; others raise a WireError."""
    wanted = np.dtype(entry.dtype)
    if values.dtype.kind == "b" and (values.view(np.uint8) > 1).any():
        raise WireError(f"{entry.name}: expected bytes 0 and 1 for truth values")
    if wanted.kind in "iu" and values.dtype.kind == "f":
        limits = np.iinfo(wanted)
        inside = (values >= limits.min) & (values <= limits.max)
        if not inside.all():
            raise WireError(f"{entry.name}: expected values in the range of {wanted}")
        whole: Array = np.rint(values).astype(wanted)
        return whole
    with np.errstate(over="ignore"):
        converted: Array = values.astype(wanted, copy=False)
    if wanted.kind in "fc" and not np.isfinite(converted).all():
        raise WireError(
            f"{entry.name}: expected finite values of {wanted}, got NaN or Inf"
        )
    return converted


def take_moved(record: ArrayRecord) -> tuple[ArrayRecord, float]:
    """Return a reply without what it says of moved entries, and that share."""
    if MOVED not in record:
        return record, 0.0
    frame = _frame(record[MOVED], "float32")
    share = float(np.frombuffer(frame, "<f4")[0]) if len(frame) == 4 else math.nan
    if not 0 <= share <= 1:
        raise WireError(f"{MOVED}: expected one float32 in [0, 1], got {frame[:8]!r}")
    return ArrayRecord({k: v for k, v in record.items() if k != MOVED}), share


def arrays_of(record: ArrayRecord) -> dict[str, Array]:
    """Return read-only views of a dense record's arrays."""
    return {
        name: read_array(
            array, Entry(name, tuple(array.shape), _type_text(array.dtype), False)
        )
        for name, array in record.items()
    }


def _type_text(dtype: str) -> str:
    """Return NumPy's short name of a type, as ``<f4`` for ``float32``."""
    try:
        return np.dtype(dtype).str if dtype else ""
    except (TypeError, SyntaxError, ValueError):
        return dtype


def record_of(arrays: Params) -> ArrayRecord:
    """Return a dense record of named arrays."""
    return ArrayRecord({n: FlowerArray(np.asarray(v)) for n, v in arrays.items()})


def named(record: ArrayRecord, plan: Plan, *, reply: bool = False) -> ArrayRecord:
    """Return a packed record, or a reply, with its original keys.

    Flower's older API replaces keys by numbers and drops types, but keeps the order.
    """
    if VALUES in record or list(record) != [str(i) for i in range(len(record))]:
        return record
    names = [VALUES, *(e.name for e in plan.manifest.whole)]
    if len(record) not in (len(names), len(names) + 1):
        raise WireError(f"expected {len(names)} arrays {names}, got {len(record)}")
    arrays = dict(zip([*names, MOVED], record.values(), strict=False))
    dtype = plan.values if reply else plan.down
    arrays[VALUES] = _raw(arrays[VALUES].data, dtype)
    if MOVED in arrays:
        arrays[MOVED] = _raw(arrays[MOVED].data, "float32")
    return ArrayRecord(arrays)


def named_arrays(
    record: ArrayRecord, manifest: Manifest, *, exact: bool = True
) -> dict[str, Array]:
    """Read a dense record whose keys are the manifest's names, or numbers.

    With ``exact=False`` other numeric types are converted to the manifest's.
    """
    names = [entry.name for entry in manifest.entries]
    keys = names if set(record) == set(names) else [str(i) for i in range(len(names))]
    if set(record) != set(names) and list(record) != keys:
        raise WireError(f"expected the arrays {names}, got {list(record)}")
    return {
        entry.name: read_array(record[key], entry, exact=exact)
        for key, entry in zip(keys, manifest.entries, strict=True)
    }


def model_record(
    content: RecordDict, key: str | None = None
) -> tuple[str, ArrayRecord]:
    """Return key and value of the ArrayRecord that holds the model.

    It is the only one, or that under `key`, as Flower's strategies name it
    (``arrayrecord_key``).
    """
    found = content.array_records
    if key is not None and len(found) > 1 and key in found:
        return key, found[key]
    named = f", or the model's under {key!r} (arrayrecord_key)" if key else ""
    return _only(found, f"ArrayRecord{named}")


def only_config(content: RecordDict) -> tuple[str, ConfigRecord]:
    """Return key and value of a message's single ConfigRecord."""
    return _only(content.config_records, "ConfigRecord")


def _only(records: Mapping[str, R], kind: str) -> tuple[str, R]:
    if len(records) != 1:
        raise WireError(f"expected exactly one {kind}, got {sorted(records) or 'none'}")
    return next(iter(records.items()))


def count_bytes(content: RecordDict) -> int:
    """Return the size of a message's records in bytes, as Flower counts it."""
    return sum(_record_bytes(record) for record in content.values())


def own_bytes(content: RecordDict, key: str | None) -> int:
    """Return the size of the model, under `key`, and of our own entries, in bytes."""
    found = content.array_records
    size = _record_bytes(found[key]) if key is not None and key in found else 0
    for record in content.values():
        if isinstance(record, ConfigRecord | MetricRecord):
            own = {name: v for name, v in record.items() if name.startswith(PREFIX)}
            size += _record_bytes(ConfigRecord(own))
    return size


def _record_bytes(record: Any) -> int:
    if isinstance(record, ConfigRecord):  # Flower counts no empty values
        kinds = (str, bytes, list)
        empty = [
            k for k, value in record.items() if isinstance(value, kinds) and not value
        ]
        rest = {key: value for key, value in record.items() if key not in empty}
        return sum(map(len, empty)) + int(ConfigRecord(rest).count_bytes())
    return int(record.count_bytes())


def _raw(frame: bytes, dtype: str) -> FlowerArray:
    size = len(frame) // (1 if dtype == "int4" else np.dtype(dtype).itemsize)
    return FlowerArray(dtype=dtype, shape=(size,), stype=RAW, data=frame)


def _frame(array: FlowerArray, dtype: str) -> bytes:
    if array.stype != RAW or array.dtype != dtype:
        raise WireError(
            f"expected an array of {dtype} serialized as {RAW!r}, "
            f"got {array.dtype!r} as {array.stype!r}"
        )
    return array.data


def _choice(config: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
    value: str = _required(config, key, str)
    if value not in choices:
        raise WireError(f"{key}: expected one of {list(choices)}, got {value!r}")
    return value


def _required(config: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = config.get(key)
    if not isinstance(value, kind):
        raise WireError(
            f"{key}: expected {kind.__name__} in the message's config, "
            f"got {type(value).__name__}"
        )
    return value
