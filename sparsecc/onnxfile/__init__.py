"""ONNX files: the container, its structure checks, shapes and synthetic inputs."""
