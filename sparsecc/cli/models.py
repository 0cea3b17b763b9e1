"""What the command line means by a model, by inputs, and by a place to write to."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecc.apply import check_ending
from sparsecc.atomic import check_writable
from sparsecc.errors import InvalidModel, InvalidOption

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from sparsecc.onnxfile.model import OnnxFile
    from sparsecc.onnxfile.shapes import DimKey
    from sparsecc.plan import Plan

_FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
_PICKLES = (".pt2", ".pt", ".pth", ".ckpt", ".pkl", ".bin")
_NOT_ONNX = (*_PICKLES, ".safetensors", ".zip", ".npz", ".npy")


@dataclass(frozen=True)
class Given:
    """A model with its example inputs (None: made up), and the files that it was read from."""

    model: Any
    inputs: Any
    dialect: str
    files: tuple[Path, ...] = ()


def read_model(text: str, inputs: Sequence[str] = (), dims: Sequence[str] = ()) -> Given:
    """The model that MODEL names: an ONNX file, or ``package.module:callable``.

    Raises InvalidOption, InvalidModel and UnsupportedModel.
    """
    factory = _FACTORY.fullmatch(text)
    if factory is not None and not os.path.exists(text):
        if inputs or dims:
            raise InvalidOption(
                "--input and --dim are for ONNX models; a factory returns its own example inputs"
            )
        model, examples = _made(factory[1], factory[2])
        return Given(model, examples, "torch")
    _refuse_others(Path(text))
    from sparsecc.onnxfile.model import OnnxFile
    from sparsecc.onnxfile.writing import source_files

    file = OnnxFile.load(text)
    return Given(file, _examples(file, inputs, dims), "onnx", tuple(source_files(file)))


def kind_of(path: Path) -> str:
    """``artifact``, ``bundle`` (a plan with weights), ``plan``, or ``other``, by the file's content."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return "other"
    if "manifest.json" in names:
        return "artifact"
    if "plan.json" in names:
        return "bundle" if "weights.safetensors" in names else "plan"
    return "other"


def check_outputs(given: Given, output: str, plan: str | None, *, force: bool) -> None:
    """Raise InvalidOption, before any work is done, where results cannot or must not be written."""
    if given.dialect == "torch":
        check_ending(output)
    if given.dialect == "onnx" and Path(output).suffix.lower() in (*_NOT_ONNX, ".scc"):
        raise InvalidOption(
            f"cannot write {output}: the result is an ONNX file; give a name that ends in .onnx"
        )
    check_place(output, given, force=force)
    if plan is not None:
        check_place(plan, given)
        if os.path.realpath(plan) == os.path.realpath(output):
            raise InvalidOption(f"--plan-out {plan}: the model is written there; choose another name")


def check_quantised_output(output: str, given: Given, *, force: bool) -> None:
    """The same for a quantised model, which is an ONNX file whatever it was made of."""
    if Path(output).suffix.lower() != ".onnx":
        raise InvalidOption(f"cannot write {output}: a quantised model is an ONNX file; end it in .onnx")
    check_place(output, given, force=force)


def check_artifact_output(
    output: str, target: str, given: Given | None = None, *, force: bool = False
) -> None:
    """The same for an artifact; without the model, what can be told before it is read."""
    import sparsecc.api  # noqa: F401  (fills the table of targets)
    from sparsecc.target import resolve

    _, spec = resolve(target)
    if output.endswith(".onnx") and spec.arch != "onnx":
        raise InvalidOption(
            f"cannot write {output}: an artifact for {target!r} is not an ONNX file; choose another ending, "
            "such as .scc, or --target onnx"
        )
    check_place(output, given, force=force)


def check_place(path: str, given: Given | None = None, *, force: bool = False) -> None:
    """Raise InvalidOption where a file cannot be written, or is one that the model was read from."""
    check_writable(path)
    for place, source in enumerate(given.files if given is not None else ()):
        if os.path.realpath(path) != os.path.realpath(source):
            continue
        if place:
            raise InvalidOption(f"cannot write {path}: the model's external data is there")
        if not force:
            raise InvalidOption(f"cannot write {path}: it is the input; choose another name, or give --force")


def read_result(path: str, given: Given, plan: Plan | None) -> tuple[Any, Plan | None]:
    """What RESULT names, and the plan that made it."""
    kind = kind_of(Path(path))
    if kind == "artifact":
        from sparsecc.api import load

        if plan is not None:
            raise InvalidOption(f"--plan: {path} holds its own plan")
        return load(path), None
    if kind == "bundle":
        from sparsecc.plan import Plan

        if plan is not None:
            raise InvalidOption(f"--plan: {path} holds its own plan")
        plan = Plan.load(path)
        return _restored(path, plan, given), plan
    found = read_model(path)
    if found.dialect != given.dialect:
        raise InvalidOption(
            f"{path} is of another kind than the original, so the two cannot be compared; compile "
            "the original into an artifact, and give that"
        )
    return found.model, plan


def _restored(path: str, plan: Plan, given: Given) -> Any:
    """The module that a plan and weights stand for."""
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    if given.dialect != "torch":
        raise InvalidOption(f"{path} holds a PyTorch model; give package.module:callable as the original")
    try:
        with zipfile.ZipFile(path) as archive:
            weights = load(archive.read("weights.safetensors"))
    except (OSError, zipfile.BadZipFile, SafetensorError) as error:
        raise InvalidModel(f"{path} is damaged: its weights cannot be read ({error})") from error
    module = plan.apply(given.model, given.inputs)
    with torch.no_grad():
        try:
            missing, unexpected = module.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise InvalidModel(f"the weights in {path} do not fit its plan: {error}") from error
    from sparsecc.fx.capture import find_ties

    absent = set(missing) - set(find_ties(module.state_dict()))
    if absent or unexpected:
        raise InvalidModel(
            f"the weights in {path} do not fit its plan: {sorted(absent)} {sorted(unexpected)}"
        )
    return module


def read_calibration(items: Sequence[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches by input name from arrays that hold samples along their first axes."""
    import torch

    arrays = read_inputs(items, "--calibration")
    if not arrays:
        raise InvalidOption("--calibration is needed: give NAME=FILE.npy for every input of the model")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        told = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise InvalidOption(
            f"--calibration: every input needs as many samples, one or more; there are {told}"
        )
    if size < 1:
        raise InvalidOption(f"--calibration-batch {size}: give a positive number of samples")
    count = next(iter(lengths.values()))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return [{n: t[at : at + size] for n, t in tensors.items()} for at in range(0, count, size)]


def read_inputs(items: Sequence[str], option: str = "--input") -> dict[str, npt.NDArray[np.generic]]:
    """Arrays by name from ``name=file.npy``; pickled content is refused."""
    import numpy as np

    found: dict[str, npt.NDArray[np.generic]] = {}
    for item in items:
        name, file = _pair(option, item, "file.npy")
        try:
            array = np.load(file, allow_pickle=False)
        except FileNotFoundError:
            raise InvalidOption(f"{option} {item}: there is no file {file}") from None
        except (OSError, ValueError, EOFError, MemoryError, OverflowError, SyntaxError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise InvalidOption(
                f"{option} {item}: {file} is no array that numpy.save wrote ({first})"
            ) from error
        if not isinstance(array, np.ndarray):
            raise InvalidOption(f"{option} {item}: {file} holds several arrays; give one .npy file per input")
        if name in found:
            raise InvalidOption(f"{option}: {name!r} is given twice")
        found[name] = array
    return found


def _refuse_others(path: Path) -> None:
    suffix = path.suffix.lower()
    if not path.exists():
        hint = "; a PyTorch model is given as package.module:callable" if suffix != ".onnx" else ""
        raise InvalidModel(f"no such file: {path}{hint}")
    if suffix in _PICKLES:
        raise InvalidOption(
            f"{path} is a PyTorch file: reading it unpickles, which would run whatever code it holds; give "
            "an ONNX file, or package.module:callable, a function that returns (model, example_inputs)"
        )
    kind = kind_of(path)
    if kind != "other":
        raise InvalidOption(
            f"{path} is a{'n artifact' if kind == 'artifact' else ' plan'} of sparsecc, which is no model; "
            "give the model that it was made from"
        )
    if suffix in _NOT_ONNX:
        raise InvalidOption(f"{path} is not an ONNX file, and holds no graph; give an ONNX file")


def _made(module_name: str, attribute: str) -> tuple[Any, Any]:
    """What a factory of the user's own returns; its code is run."""
    import torch
    from torch.export import ExportedProgram

    text = f"{module_name}:{attribute}"
    if module_name.endswith(".py"):
        raise InvalidOption(f"{text}: name the module as import does: {module_name[:-3]}:{attribute}")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        why = "there is no such module here" if missing else f"{type(error).__name__}: {error}"
        raise InvalidOption(f"{text}: {module_name} cannot be imported: {why}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidOption(f"{text}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, torch.nn.Module):
        raise InvalidOption(f"{text} is not a function; write one that returns (model, example_inputs)")
    try:
        result = found()
    except (Exception, SystemExit) as error:
        raise InvalidOption(f"{text}() failed: {type(error).__name__}: {error}") from error
    if isinstance(result, ExportedProgram):
        return result, None
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.nn.Module)):
        raise InvalidOption(
            f"{text}() must return (model, example_inputs); it returned {type(result).__name__}"
        )
    return result


def _examples(file: OnnxFile, inputs: Sequence[str], dims: Sequence[str]) -> dict[str, Any] | None:
    given = read_inputs(inputs)
    if not dims:
        return dict(given) or None
    names = [value.name for value in file.inputs]
    if unknown := sorted(set(given) - set(names)):
        raise InvalidOption(f"no input is named {', '.join(unknown)}; the model takes {', '.join(names)}")
    from sparsecc.onnxfile.model import to_torch
    from sparsecc.onnxfile.synth import synthesise

    sizes = dimension_sizes(file, dims, given)
    tensors = {name: tensor for name, array in given.items() if (tensor := to_torch(array)) is not None}
    return dict(synthesise(file, sizes, 0, tensors).inputs)


def dimension_sizes(
    file: OnnxFile, dims: Sequence[str], given: Mapping[str, npt.NDArray[np.generic]]
) -> dict[DimKey, int]:
    """Sizes by dynamic dimension: of ``--dim``, and of the arrays given."""
    from sparsecc.onnxfile.shapes import dim_key

    known: dict[str, DimKey] = {}
    sizes: dict[DimKey, int] = {}
    for info in file.inputs:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.dim_value > 0:
                continue
            key = dim_key(info.name, axis, dim.dim_param)
            known[key if isinstance(key, str) else f"{key[0]}[{key[1]}]"] = key
            if info.name in given and axis < given[info.name].ndim:
                sizes[key] = given[info.name].shape[axis]
    for item in dims:
        name, text = _pair("--dim", item, "size")
        if name not in known:
            listed = ", ".join(known) or "none"
            raise InvalidOption(f"--dim {item}: the model has no dynamic dimension {name!r}; it has {listed}")
        if not text.isdecimal() or not 0 < int(text) < 1 << 31:
            raise InvalidOption(f"--dim {item}: {text!r} is not a positive whole number")
        if sizes.setdefault(known[name], int(text)) != int(text):
            raise InvalidOption(f"--dim {item}: the inputs given have size {sizes[known[name]]} there")
    return sizes


def _pair(option: str, item: str, what: str) -> tuple[str, str]:
    name, sign, value = item.rpartition("=") if option == "--dim" else item.partition("=")
    if not (name and sign and value):
        raise InvalidOption(f"{option} {item}: write {option} name={what}")
    return name, value
