"""The client's half of the protocol: a Flower mod around any app."""

import copy
import math
from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message

from autoflip_flwr.errors import MaskError, WireError
from autoflip_flwr.method import guidance
from autoflip_flwr.method.privacy import GuidancePrivacy
from autoflip_flwr.types import Guidance, Params
from autoflip_flwr.units import enforce, optimizers
from autoflip_flwr.wire import codec, records
from autoflip_flwr.wire.flower import ClientAppCallable

#: Most epochs that a server may ask for, unless the client says otherwise.
MAX_EPOCHS = 1000


class AutoFlipMod:
    """Lets an existing ClientApp take part in AutoFLIP.

    It unpacks a message, calls the app with dense arrays and packs the reply. To
    explore, it calls the app's train function several times, each time with the
    weights of the call before and the state of its `torch.optim` optimizers, and
    replies with the local guidance (arXiv:2405.10271, Eq. 2). It keeps the last mask in
    `context.state`, so that the server need not send it again. Messages of other
    strategies pass unchanged.

    While the app trains, pruned weights stay at zero after each step of any
    `torch.optim` optimizer. If something else moves them, the server says so; then use
    `masked`. After an exploration the app's `context.state` is what it was before.

    Parameters
    ----------
    loss_key : str, optional
        Metric of the app's replies that stops the exploration early. By default the
        first one with "loss" in its name; without one, all epochs are done.
    privacy : GuidancePrivacy, or callable of Context that returns one or None, optional
        Clips the guidance and adds noise before it leaves the client. Requests for
        gradients or the signs of a warm start are then refused.
    start : callable of Context that returns an ArrayRecord, optional
        Builds the weights that the server begins with, from a seed or a checkpoint of
        the client: the server's own `initial_arrays`, bit for bit. With
        ``ExplorationSettings(own_start=True)`` they do not travel to explorers.
    max_epochs : int
        Most epochs of an exploration that a server may ask for.
    max_megabytes : int
        Most megabytes of the dense model that a server may describe. While a message is
        handled, a client needs a few times as much memory. A node's own config
        (``--node-config 'max-epochs=20 max-megabytes=200'``) goes before both.

    Examples
    --------
    ::

        app = ClientApp(mods=[AutoFlipMod()])

    Mods that work on dense arrays (clipping, local differential privacy) go behind it.
    Flower's own fail on evaluations: ``@app.train(mods=[LocalDpMod(...)])``.
    """

    def __init__(
        self,
        *,
        loss_key: str | None = None,
        privacy: GuidancePrivacy
        | Callable[[Context], GuidancePrivacy | None]
        | None = None,
        start: Callable[[Context], ArrayRecord] | None = None,
        max_epochs: int = MAX_EPOCHS,
        max_megabytes: int = 512,
    ) -> None:
        self.loss_key = loss_key
        self.privacy = privacy
        self.start = start
        self.max_epochs = max_epochs
        self.max_megabytes = max_megabytes

    def __call__(
        self, message: Message, context: Context, call_next: ClientAppCallable
    ) -> Message:
        """Handle one message."""
        config = records.config_of(message)
        phase = records.phase_of(config)
        if phase is None:
            return call_next(message, context)
        self._check_limits(config, context)
        if phase == "explore":
            privacy = self.privacy(context) if callable(self.privacy) else self.privacy
            state = copy.deepcopy(context.state)
            try:
                return self._explore(message, context, call_next, privacy)
            finally:  # an exploration leaves no trace
                context.state = state
        records.complete_mask(config, context.state)
        plan = records.Plan.of(config)
        key, record = _model_of(message)
        arrays = plan.unpack(records.named(record, plan))
        for name, keep in plan.masks.items():
            arrays[name] = enforce.marked(arrays[name], keep)
        arrays = plan.manifest.tied(arrays)
        message.content[key] = records.record_of(arrays)
        with enforce.enforce_unseen(plan.masks) as held:
            reply = call_next(message, context)
        if reply.has_error() or (
            phase == "evaluate" and not _has_model(reply, plan, key)
        ):
            return reply
        reply_key, record = records.model_record(reply.content, key)
        trained = records.named_arrays(record, plan.manifest, exact=False)
        # What training kept and noise then moved, of a mod, say, is no concern.
        reply.content[reply_key] = plan.pack_reply(trained, arrays, held)
        return reply

    def _check_limits(self, config: ConfigRecord, context: Context) -> None:
        """Refuse what would cost more than this client allows, before any work."""
        own = context.node_config
        megabytes = int(own.get("max-megabytes", self.max_megabytes))
        size = records.manifest_of(config).dense_bytes
        if size > megabytes * 1e6:
            raise WireError(
                f"expected a model of at most {megabytes} MB, the server describes one "
                f"of {size / 1e6:.0f} MB; this client's limit is max-megabytes in its "
                "node config"
            )
        asked = config.get(records.EPOCHS)
        if isinstance(asked, int):
            check_epochs(asked, context, most=self.max_epochs)

    def _explore(
        self,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
        privacy: GuidancePrivacy | None,
    ) -> Message:
        """Measure what the server asks for with the app's own train function."""
        asked = records.Exploration.of(records.config_of(message))
        if privacy is not None and asked.measure != "deviation":
            raise WireError(
                "this client tells its guidance alone, with noise; the server asked "
                f"for {asked.measure!r}: set exploration.warm-start=false and "
                "strategy.name=autoflip"
            )
        key, record = _model_of(message)
        initial = self._built(asked, context) if asked.start else asked.unpack(record)
        message.content[key] = records.record_of(initial)
        signs, done = None, 1
        if asked.measure in ("deviation", "update"):
            reply, trained, done = self._train(
                asked, initial, message, context, call_next
            )
            start = {name: initial[name] for name in asked.manifest.shapes}
            end = {name: trained[name] for name in start}
            measured: Guidance = guidance.squared_deviation(start, end)
            if asked.measure == "update":
                rises = {name: end[name] > value for name, value in start.items()}
                signs = codec.pack_mask(rises)
        else:
            reply, measured = _gradient(asked, initial, message, context, call_next)
        if reply.has_error():
            return reply
        reply_key, _ = records.model_record(reply.content, key)
        if privacy is not None:
            measured = privacy.protect(measured)
        frame = codec.quantize(measured)
        reply.content[reply_key] = records.guidance_record(frame, signs)
        for metrics in reply.content.metric_records.values():
            metrics[records.EPOCHS] = done
        return reply

    def _built(self, asked: records.Exploration, context: Context) -> Params:
        """Return the weights that the server named instead of sending them."""
        if self.start is None:
            raise WireError(
                "the server expects clients to build its start weights: "
                "AutoFlipMod(start=...), or exploration.own-start=false"
            )
        return asked.built(self.start(context))

    def _train(
        self,
        asked: records.Exploration,
        initial: Params,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
    ) -> tuple[Message, Params, int]:
        """Train from W0; return the last reply, the weights and the epochs done."""
        config_key, config = records.only_config(message.content)
        key, _ = _model_of(message)
        best, stale = math.inf, 0
        continued = optimizers.Continued()
        trained: Params = initial
        for done in range(1, asked.epochs + 1):
            message.content[config_key] = ConfigRecord(
                {**config, records.EPOCH: done - 1, records.EPOCHS: asked.epochs}
            )
            with continued.call():
                reply = call_next(message, context)
            if reply.has_error():
                break
            _, record = records.model_record(reply.content, key)
            trained = records.named_arrays(record, asked.manifest, exact=False)
            loss = self._loss(reply)
            if loss < best:
                best, stale = loss, 0
            elif not math.isnan(loss):
                stale += 1
            if stale >= asked.patience:
                break
            message.content[key] = records.record_of(trained)
        return reply, trained, done

    def _loss(self, reply: Message) -> float:
        """Return the loss that the app reports; NaN if it reports none."""
        metrics: list[tuple[str, object]] = [
            *(i for r in reply.content.metric_records.values() for i in r.items()),
            # where the older API has its metrics
            *(i for r in reply.content.config_records.values() for i in r.items()),
        ]
        for name, value in metrics:
            wanted = name == self.loss_key if self.loss_key else "loss" in name.lower()
            if wanted and isinstance(value, int | float):
                return float(value)
        if self.loss_key:
            raise WireError(
                f"expected the app to report the metric {self.loss_key!r}, "
                f"got {sorted({name for name, _ in metrics})}"
            )
        return math.nan


def _model_of(message: Message) -> tuple[str, ArrayRecord]:
    """Return key and value of the record with the model."""
    key = records.config_of(message).get(records.ARRAYS)
    return records.model_record(message.content, key if isinstance(key, str) else None)


def _has_model(reply: Message, plan: records.Plan, key: str) -> bool:
    """Tell whether an evaluation sends the model back, as some apps do."""
    found = reply.content.array_records
    names = {entry.name for entry in plan.manifest.entries}
    return key in found and set(found[key]) == names


def check_epochs(asked: int, context: Context, *, most: int = MAX_EPOCHS) -> None:
    """Refuse more epochs than this client allows."""
    most = int(context.node_config.get("max-epochs", most))
    if asked > most:
        raise WireError(
            f"expected at most {most} local epochs, the server asks for {asked}; this "
            "client's limit is max-epochs in its node config"
        )


def _gradient(
    asked: records.Exploration,
    initial: Params,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
) -> tuple[Message, Guidance]:
    """Let the app go through its data at fixed weights; measure the gradients."""
    trainable = [entry for entry in asked.manifest.entries if entry.trainable]
    with optimizers.gradients_of([entry.shape for entry in trainable]) as seen:
        reply = call_next(message, context)
    if reply.has_error():
        return reply, {}
    if not seen.steps:
        raise MaskError(
            f"to measure gradients, expected a torch.optim optimizer of the "
            f"{len(trainable)} trainable parameters in the model's order; the app made "
            "no step with one (if it ties weights, give the strategy model=Net())"
        )
    squared = asked.measure == "squared-gradient"
    gradients = seen.mean_square() if squared else seen.mean()
    sizes = {}
    for entry, gradient in zip(trainable, gradients, strict=True):
        if entry.masked:
            size = np.abs(gradient)
            if asked.measure == "saliency":
                size = size * np.abs(initial[entry.name]).astype(np.float32)
            sizes[entry.name] = size
    return reply, sizes
