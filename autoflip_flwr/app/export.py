"""Write a run's final model compact, for use without this package."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

from autoflip_flwr import settings, units
from autoflip_flwr.app import build, training
from autoflip_flwr.app.folder import masks_of
from autoflip_flwr.errors import ModelError, SettingsError
from autoflip_flwr.types import Masks
from autoflip_flwr.units import enforce

_log = logging.getLogger("flwr")

_TOLERANCE = 1e-4  # of the largest output, in float32


@dataclass(frozen=True, slots=True)
class Exported:
    """The files of an export; `onnx` is None where onnx is not installed."""

    weights: Path
    program: Path
    onnx: Path | None
    parameters: int  # of the compact model
    dense_parameters: int


def export_run(run: Path, output: Path | None = None) -> Exported:
    """Export the final model of a run's folder, by default to ``export`` in it."""
    chosen = settings.read(run / "settings.yaml")
    path = run / "model.safetensors"
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SettingsError(
            f"expected the folder of a finished run, with {path.name} in it: {error}"
        ) from error
    masks = masks_of(run)
    model = build.build_model(chosen)
    training.load_arrays(model, arrays)
    example = build.example_inputs(chosen)
    if example.is_floating_point():
        example = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    return export_model(model, masks, example, output or run / "export")


def export_model(
    model: nn.Module, masks: Masks, example: torch.Tensor, output: Path
) -> Exported:
    """Export a masked model as compact weights and programs.

    Masked entries are taken as zero. To `output` go ``model.safetensors`` (the small
    tensors, and ``NAME.kept.DIM`` with the kept indices of tensors that are smaller),
    ``model.pt2`` (`torch.export`) and ``model.onnx``. The `example` is one sample; the
    programs take any number. One that answers otherwise than the masked model is an
    error.
    """
    model = copy.deepcopy(model).cpu().eval()
    small = model
    with enforce.enforce(model, masks):
        if units.loses_units(masks):
            try:
                small = units.compact(model, masks, example).eval()
            except ModelError as error:
                _log.warning("the model is exported whole: %s", error)
    inputs = torch.cat([example, example])
    with torch.no_grad():
        expected = model(inputs)
    output.mkdir(parents=True, exist_ok=True)
    kinds = ("safetensors", "pt2", "onnx")
    weights, pt2, onnx = (output / f"model.{kind}" for kind in kinds)
    for path in (weights, pt2, onnx):
        path.unlink(missing_ok=True)  # of an export before
    save_file(_tensors(small), weights, {"format": "pt"})
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with _exporting("torch.export", small, "model.safetensors has its weights"):
        program = torch.export.export(small, (inputs,), dynamic_shapes=shapes)
    torch.export.save(program, pt2)
    loaded = torch.export.load(pt2).module()
    _compare("model.pt2", loaded(inputs), expected)
    if all(map(find_spec, ("onnx", "onnxscript"))):
        left = "model.pt2 and model.safetensors are there"
        with _exporting("torch.onnx", small, left):
            torch.onnx.export(
                program,
                f=onnx,
                input_names=["input"],
                output_names=["output"],
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    return Exported(
        weights=weights,
        program=pt2,
        onnx=onnx if onnx.exists() else None,
        parameters=sum(p.numel() for p in small.parameters()),
        dense_parameters=sum(p.numel() for p in model.parameters()),
    )


@contextmanager
def _exporting(exporter: str, model: nn.Module, left: str) -> Iterator[None]:
    """Say what is left where an exporter fails; hide torch's own warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever the exporter raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{exporter} cannot export {type(model).__name__}: {reason}; {left}"
        ) from error


def _tensors(small: nn.Module) -> dict[str, torch.Tensor]:
    """Return the small tensors, and where they were in the whole ones."""
    tensors = {name: value.clone() for name, value in small.state_dict().items()}
    for name, indices in units.kept_indices(small, default={}).items():
        for dim, index in enumerate(indices):
            if index is not None:
                tensors[f"{name}.kept.{dim}"] = torch.from_numpy(index)
    return tensors


def _compare(what: str, got: Any, expected: Any) -> None:
    for one, other in zip(
        units.tensors_of(got), units.tensors_of(expected), strict=True
    ):
        difference = (one.detach() - other).abs().max()
        worst = float(difference / other.abs().max().clamp_min(1e-30))
        if not worst <= _TOLERANCE:
            raise ModelError(
                f"{what} does not answer as the masked model does: expected a "
                f"difference of at most {_TOLERANCE} of the largest output, "
                f"got {worst:.2g}"
            )
