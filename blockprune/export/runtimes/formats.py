"""Writing a program in the format of a runtime, and running it there: ONNX Runtime, OpenVINO, torch.export, AOTInductor."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from blockprune.errors import UserError, explanation, first_line
from blockprune.export.runtimes import check_precision
from blockprune.export.runtimes.components import Component, Inputs

Runner = Callable[[Inputs], list[Tensor]]  # tensors by name => the outputs
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights in one file, which protobuf limits to 2 GiB; larger ones lie beside it


@dataclass(frozen=True)
class Format:
    """A format: the runtime that reads it, the packages that takes and how pip gets them, and its file.

    Where `compiles`, writing takes a C++ compiler. `write(program, component, path, precision)` and `load(path)` may raise whatever
    the runtime does.
    """

    name: str
    runtime: str
    packages: tuple[str, ...]
    extra: str
    file: str
    write: Callable[[ExportedProgram, Component, Path, str], None]
    load: Callable[[Path], Runner]
    compiles: bool = False

    def check(self) -> None:
        """Raises UserError where the runtime, or the compiler that it takes, is not installed."""
        if missing := [p for p in self.packages if importlib.util.find_spec(p) is None]:
            are = "is" if len(missing) == 1 else "are"
            raise UserError(
                f"{self.name} needs {' and '.join(missing)}, which {are} missing: pip install 'blockprune[{self.extra}]'"
            )
        if self.compiles:
            check_compiler(self.name)


def check_compiler(name: str) -> None:
    """Raises UserError where `name`, which compiles C++, finds no compiler."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise UserError(f"{name} needs a C++ compiler, and there is no {' or '.join(compilers)}: install one, or set CXX to it")


@contextmanager
def in_words(form: Format, component: str) -> Iterator[None]:
    """What an exporter or a runtime raises in this context becomes a UserError; what the system raises stays as it is."""
    try:
        yield
    except Exception as err:
        if explanation(err) is not None:
            raise
        raise UserError(f"{form.name} cannot say or run the {component} ({first_line(err)}): choose another format") from None


def program_of(component: Component) -> ExportedProgram:
    """The component as a graph, for any batch size and any spatial size that it takes."""
    batch, size = {0: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    shapes = [size if name in component.spatial else batch for name in component.example]
    condition = [tuple(shapes[2:])] if len(shapes) > 2 else []  # the tensors that a Denoiser takes after the first two
    dynamic: Any = (*shapes[:2], *condition)
    # of twice the size: a map of one pixel in the innermost stage would make the size a constant
    traced = tuple(t.repeat(1, 1, 2, 2) if name in component.spatial else t for name, t in component.example.items())
    with quiet(), torch.no_grad():
        program = torch.export.export(component.module, traced, dynamic_shapes=dynamic)
    for node in program.graph.nodes:  # Python's stack for each, with the paths of this machine
        node.meta.pop("stack_trace", None)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters' notices of their own insides go."""
    names = ("torch.onnx", "onnxscript", "torch._export", "torch.fx", "onnx_ir", "")  # and the root, which quantisation writes to
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _write_onnx(program: ExportedProgram, component: Component, path: Path, precision: str) -> None:
    with quiet():
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=list(component.example), output_names=list(component.outputs)
        )
    assert made is not None
    _forget_sources(made.model)
    large = sum(t.nbytes for t in program.state_dict.values()) > LARGEST_ONNX
    if precision != "int8":
        made.save(str(path), external_data=large)
        return
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = path.with_name(f"whole-{path.name}")
    made.save(str(whole), external_data=large)
    model = onnx.load(str(whole))
    del model.graph.value_info[:]  # the exporter's shapes, which quantisation would hold against its own
    for file in whole.parent.glob(f"{whole.name}*"):
        file.unlink()
    with quiet():
        kinds = ["MatMul", "Gemm"]
        quantize_dynamic(model, str(path), weight_type=QuantType.QInt8, op_types_to_quantize=kinds, use_external_data_format=large)


def _forget_sources(model: Any) -> None:
    """Takes the exporter's notes off a graph, which are half of a small file."""
    model.metadata_props.clear()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _load_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave the processor to others
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {i.name: ONNX_TYPES.get(i.type, np.float32) for i in session.get_inputs()}

    def run(inputs: Inputs) -> list[Tensor]:
        return [torch.from_numpy(o) for o in session.run(None, {n: _array(t, kinds[n]) for n, t in inputs.items() if n in kinds})]

    return run


ONNX_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def _array(t: Tensor, kind: Any) -> NDArray[Any]:
    return np.ascontiguousarray(t.detach().cpu().numpy(), dtype=kind)


def _write_openvino(program: ExportedProgram, component: Component, path: Path, precision: str) -> None:
    import openvino

    with quiet():
        model = openvino.convert_model(program)
    for port, name in zip(model.inputs, component.example, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, component.outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, str(path), compress_to_fp16=precision == "float16")


def _load_openvino(path: Path) -> Runner:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(str(path), "CPU", settings)
    names = [port.any_name for port in model.inputs]

    def run(inputs: Inputs) -> list[Tensor]:
        found = model([inputs[name].detach().cpu().numpy() for name in names])
        return [torch.from_numpy(found[i].copy()) for i in range(len(model.outputs))]

    return run


def _write_program(program: ExportedProgram, component: Component, path: Path, precision: str) -> None:
    torch.export.save(program, path)


def _load_program(path: Path) -> Runner:
    return _runner(torch.export.load(path).module(check_guards=False))  # these refuse a map of one pixel, which the graph can take


def _write_compiled(program: ExportedProgram, component: Component, path: Path, precision: str) -> None:
    with quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load_compiled(path: Path) -> Runner:
    return _runner(torch._inductor.aoti_load_package(str(path)))


def _runner(module: Callable[..., Any] | nn.Module) -> Runner:
    @torch.inference_mode()
    def run(inputs: Inputs) -> list[Tensor]:
        found = module(*(t.contiguous() for t in inputs.values()))  # a compiled program takes the strides that it was traced with
        return [found] if isinstance(found, Tensor) else list(found)

    return run


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            *("onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), "onnx", "model.onnx"),
            _write_onnx,
            _load_onnx,
        ),
        Format(
            *("openvino", "openvino", ("openvino",), "openvino", "openvino_model.xml"),
            *(_write_openvino, _load_openvino),
        ),
        Format("torch-export", "torch-export", (), "", "model.pt2", _write_program, _load_program),
        Format(
            *("aot-inductor", "aot-inductor", (), "", "model.aoti.pt2"),
            *(_write_compiled, _load_compiled, True),
        ),
    )
}


def format_of(name: str, precision: str = "float32") -> Format:
    """The format of that name, ready to use; UserError lists those there are, and says what is missing."""
    check_precision(name, precision)
    FORMATS[name].check()
    return FORMATS[name]


def files(folder: Path, names: Sequence[str]) -> list[tuple[str, Path, Format]]:
    """(component, file, format) of what an exported folder has of these components."""
    return [(name, folder / name / f.file, f) for name in names for f in FORMATS.values() if (folder / name / f.file).is_file()]
