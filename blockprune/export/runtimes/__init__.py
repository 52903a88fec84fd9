"""Pipelines outside PyTorch: each component as a program, in the formats of other runtimes, compared with the original there."""

TORCH, COMPILED = "torch", "torch-compile"
RUNTIMES = (TORCH, COMPILED, "onnxruntime", "openvino", "torch-export", "aot-inductor")  # what computes a network
FORMAT_NAMES = ("onnx", "openvino", "torch-export", "aot-inductor")  # what a network is written in, for all but the first two
PRECISIONS = ("float32", "float16", "int8")
