"""Prunes hundreds of public architectures and proves each result: ``make zoo``.

suites.py    every entry: torchvision, timm and Hugging Face, as lists of names and builders
weights.py   weights under which an error would show
measure.py   one entry on one path (PyTorch or its ONNX export) becomes a ``Row``
work.py      each in a process of its own, with limits on time and memory
table.py     rows as tables: terminal, docs/zoo.md, docs/zoo.json
__main__.py  the command
"""
