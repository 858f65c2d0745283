"""Reading and writing parameters: the public ``params_model_*.npz`` layout, and safetensors.

A public file names every array ``alphafold/alphafold_iteration/<module>//<name>``. The blocks of a
stack are one array with a leading axis; a linear layer's ``weights`` are (in, out), and where
inputs or outputs are heads, these are an axis of their own.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from hairpin.errors import MissingExtraError, WeightsError
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.embedders import RelativeChainPosition
from hairpin.models.alphafold.pair import FusedTriangleOperands
from hairpin.models.alphafold.recognise import config_from

__all__ = [
    "ROOT",
    "Array",
    "config_from",
    "config_from_safetensors",
    "load",
    "load_arrays",
    "load_safetensors",
    "names",
    "open_npz",
    "save_npz",
    "save_safetensors",
    "to_arrays",
]

ROOT = "alphafold/alphafold_iteration"

Arrays = Mapping[str, np.ndarray]

_SHOWN = 8  # names of wrong arrays that an error lists of each kind

# Our names -> a public file's, one after another on "path.of.module//leaf". Those in {braces}
# depend on the model: see _fixed_names.
_SINGLE = "evoformer.template_embedding.single_template_embedding"
_RENAMED = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^input_embedder\.relative_position\.linear//", "evoformer.{relative}//"),
        (r"^(input_embedder|recycling_embedder|template_rows)\.", "evoformer."),
        (
            r"^template_embedder\.(attention|output_linear)\b",
            r"evoformer.template_embedding.\1",
        ),
        (
            r"^template_embedder\.template_pair_stack\.blocks\.",
            f"{_SINGLE}.{{template_blocks}}.",
        ),
        (r"^template_embedder\.template_pair_stack\.output", f"{_SINGLE}.output"),
        (r"^template_embedder\.", f"{_SINGLE}."),
        (r"\.template_pair_embedding\.(\d+)//", r".template_pair_embedding_\1//"),
        (r"^extra_msa_embedder\.linear//", "evoformer.extra_msa_activations//"),
        (r"^extra_msa_stack\.blocks\.", "evoformer.extra_msa_stack."),
        (r"^evoformer\.blocks\.", "evoformer.evoformer_iteration."),
        (r"^single_activations//", "evoformer.single_activations//"),
        (r"^heads\.(\w+)", r"\1_head"),
        (r"\.pair_stack\.", "."),
        (r"\bouter_product_mean\.norm//", "outer_product_mean.layer_norm_input//"),
        (r"\.(left|right)\.linear//", r".\1_projection//"),
        (r"\bouter_product_mean\.output//weights", "outer_product_mean//output_w"),
        (r"\bouter_product_mean\.output//bias", "outer_product_mean//output_b"),
        (r"(\btriangle_multiplication\w*)\.norm//", r"\1.{triangle_norm}//"),
        (r"\.center_norm//", ".{center_norm}//"),
        (r"\.operands\.", "."),
        (r"\.pair_bias\.norm//", ".feat_2d_norm//"),
        (r"\.pair_bias\.linear//weights", "//feat_2d_weights"),
        (r"(transition\w*)\.norm//", r"\1.input_layer_norm//"),
        (r"(transition\w*)\.linear_(\d)//", r"\1.transition\2//"),
        (r"\battention\.gate//(\w).*", r"attention//gating_\1"),
        (r"\battention\.(query|key|value|output)//(\w).*", r"attention//\1_\2"),
    )
)


@dataclass(frozen=True)
class Array:
    """One array of a public file and the parameters it holds.

    Attributes:
        shape: shape in the file, the blocks' axis included.
        parameters: names in the model; more than one for the blocks of a stack.
        stacked: there is a leading axis of blocks.
    """

    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    stacked: bool


def names(model: nn.Module, part: str | None = None) -> dict[str, Array]:
    """What a public file of this model holds, by the file's names, sorted.

    Args:
        model: an `AlphaFold`, or a part of one.
        part: the name of a part in the file; names then begin with it.
    """
    fixed = _fixed_names(model)
    found: dict[str, Array] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            ours = f"{path}.{leaf}" if path else leaf
            whole = f"{part}.{path}".rstrip(".") if part else path
            stacked = re.search(r"\bblocks\.\d+\.", whole) is not None
            name = _file_name(f"{whole}//{_file_leaf(module, leaf)}", fixed)
            name = name if part else f"{ROOT}/{name}"
            shape = _file_shape(module, leaf, parameter)
            earlier = found[name].parameters if name in found else ()
            blocks = (len(earlier) + 1,) if stacked else ()
            found[name] = Array((*blocks, *shape), (*earlier, ours), stacked)
    return dict(sorted(found.items()))


def _fixed_names(model: nn.Module) -> dict[str, str]:
    """Names that differ between the monomer and the multimer, and with fused projections."""
    kinds = {type(module) for module in model.modules()}
    multimer, fused = RelativeChainPosition in kinds, FusedTriangleOperands in kinds
    return {
        "relative": "~_relative_encoding.position_activations" if multimer else "pair_activiations",
        "template_blocks": "template_embedding_iteration"
        if multimer
        else "template_pair_stack.__layer_stack_no_state",
        "triangle_norm": "left_norm_input" if fused else "layer_norm_input",
        "center_norm": "center_norm" if fused else "center_layer_norm",
    }


def _file_name(name: str, fixed: dict[str, str]) -> str:
    name = re.sub(r"\bblocks\.\d+\.", "blocks.", name)
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name)
    return name.format(**fixed).replace(".", "/")


def _file_leaf(module: nn.Module, leaf: str) -> str:
    if isinstance(module, nn.LayerNorm):
        return {"weight": "scale", "bias": "offset"}[leaf]
    if isinstance(module, nn.Linear):
        return {"weight": "weights", "bias": "bias"}[leaf]
    return leaf


def _file_shape(module: nn.Module, leaf: str, parameter: Tensor) -> tuple[int, ...]:
    if not isinstance(module, nn.Linear):
        return tuple(parameter.shape)
    c_in, c_out = module.in_features, module.out_features
    heads, heads_in = getattr(module, "heads", None), getattr(module, "heads_in", None)
    outer = (heads, c_out // heads) if heads else (c_out,)
    if leaf == "bias":
        return outer
    if c_in == 1:  # a number through a linear layer has no axis in the file
        return outer
    inner = (heads_in, c_in // heads_in) if heads_in else (c_in,)
    return (*inner, *outer)


# ------------------------------------------------------------------------------------ npz


def load(model: nn.Module, path: str | Path) -> None:
    """Fill the model from a file in the public npz layout.

    Raises:
        WeightsError: the file cannot be read, or an array is missing, surplus or misshaped.
    """
    with open_npz(path) as file:
        load_arrays(model, file, source=str(path))


def load_arrays(
    model: nn.Module, arrays: Arrays, *, source: str = "the arrays", part: str | None = None
) -> None:
    """Fill the model from arrays by a public file's names.

    Raises:
        WeightsError: an array is missing, surplus or misshaped; all of them are counted.
    """
    wanted = names(model, part)
    _check(wanted, arrays, source)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in wanted.items():
            for parameter, value in _unpacked(array, arrays[name], parameters):
                parameter.copy_(value)


def _unpacked(
    array: Array, value: np.ndarray, parameters: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of an array with what the file has for it, turned to our layout."""
    parts = list(value) if array.stacked else [value]
    pairs = []
    for name, part in zip(array.parameters, parts, strict=True):
        parameter = parameters[name]
        tensor = torch.from_numpy(np.array(part))
        if parameter.ndim == 2:
            tensor = tensor.reshape(parameter.shape[::-1]).T
        pairs.append((parameter, tensor.reshape(parameter.shape)))
    return pairs


def to_arrays(
    model: nn.Module, tensors: Mapping[str, Tensor] | None = None, part: str | None = None
) -> dict[str, np.ndarray]:
    """The parameters, or other tensors by their names (gradients), as a public file has them."""
    values = dict(model.named_parameters()) if tensors is None else tensors
    packed = {}
    for name, array in names(model, part).items():
        shape = array.shape[1:] if array.stacked else array.shape
        parts = [
            values[parameter].detach().T.cpu().numpy().reshape(shape)
            if values[parameter].ndim == 2
            else values[parameter].detach().cpu().numpy().reshape(shape)
            for parameter in array.parameters
        ]
        packed[name] = np.stack(parts) if array.stacked else np.ascontiguousarray(parts[0])
    return packed


def save_npz(model: nn.Module, path: str | Path) -> None:
    """Write the model in the public npz layout.

    Raises:
        WeightsError: the file cannot be written.
    """
    try:
        np.savez(path, **to_arrays(model))  # type: ignore[arg-type]
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}") from error


def open_npz(path: str | Path) -> Any:
    """A npz file, its arrays read when asked for; nothing in it may be pickled.

    Raises:
        WeightsError: the file is absent or is not a whole npz file.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"{path} is not a whole npz file ({error}); download it again"
        ) from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise WeightsError(f"{path} is one array, not a npz file; give params_model_*.npz")
    return file


def _check(wanted: Mapping[str, Array], arrays: Mapping[str, Any], source: str) -> None:
    missing = [name for name in wanted if name not in arrays]
    surplus = [name for name in arrays if name not in wanted]
    misshaped = [
        f"{name} is {_size(arrays[name].shape)}, the model has {_size(array.shape)}"
        for name, array in wanted.items()
        if name in arrays and arrays[name].shape != array.shape
    ]
    kinds = (("missing", missing), ("surplus", surplus), ("misshaped", misshaped))
    if any(found for _, found in kinds):
        lists = [_listed(kind, found) for kind, found in kinds if found]
        raise WeightsError(
            f"{source} does not fit the model:\n"
            + "\n".join(lists)
            + "\ngive the file of this model, or the model of this file"
        )


def _listed(kind: str, found: list[str]) -> str:
    lines = [f"  {name.removeprefix(ROOT + '/')}" for name in found[:_SHOWN]]
    more = [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n".join([f"{len(found)} {kind}:", *lines, *more])


def _size(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


# ------------------------------------------------------------------------------------ safetensors


def save_safetensors(model: nn.Module, path: str | Path) -> None:
    """Write the model's parameters by our names, with its settings in the file's metadata.

    Raises:
        WeightsError: the file cannot be written.
    """
    save_file = _safetensors("save_file")
    tensors = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    config = getattr(model, "config", None)
    metadata = {}
    if isinstance(config, AlphaFoldConfig):
        metadata["config"] = json.dumps(asdict(config))
    try:
        save_file(tensors, str(path), metadata=metadata)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}") from error


def load_safetensors(model: nn.Module, path: str | Path) -> None:
    """Fill the model from a file that `save_safetensors` wrote.

    Raises:
        WeightsError: the file cannot be read, or a tensor is missing, surplus or misshaped.
    """
    tensors = _read_safetensors(path)
    parameters = dict(model.named_parameters())
    wanted = {name: Array(tuple(value.shape), (name,), False) for name, value in parameters.items()}
    _check(wanted, tensors, str(path))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def config_from_safetensors(path: str | Path) -> AlphaFoldConfig:
    """The settings in the metadata of a file that `save_safetensors` wrote.

    Raises:
        WeightsError: the file cannot be read, or holds no settings.
    """
    safe_open = _safetensors("safe_open", "safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    if "config" not in metadata:
        raise WeightsError(f"{path} does not say which model it holds; save it with hairpin")
    config: AlphaFoldConfig = _from_dict(AlphaFoldConfig, json.loads(metadata["config"]))
    return config


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    load_file = _safetensors("load_file")
    try:
        return load_file(str(path))  # type: ignore[no-any-return]
    except Exception as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def _safetensors(name: str, module: str = "safetensors.torch") -> Any:
    from importlib import import_module

    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise MissingExtraError(
            "safetensors files need safetensors: pip install 'hairpin[fold]'"
        ) from error


def _from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """A frozen settings class from the dict that ``asdict`` made of it."""
    hints = get_type_hints(kind)
    made = {}
    for field in fields(kind):
        value = values[field.name]
        inner = next(
            (k for k in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(k)), None
        )
        made[field.name] = _from_dict(inner, value) if inner and value is not None else value
    return kind(**made)
