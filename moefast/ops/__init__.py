"""One description of a computation, several readers: NumPy, torch, ONNX."""
