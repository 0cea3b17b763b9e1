"""Nothing here runs without onnx-graphsurgeon (``pip install 'sparsecc[gs]'``)."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("onnx_graphsurgeon") else ["test_*.py"]
