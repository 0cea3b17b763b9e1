"""CUDA graphs of functions, and their times."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(function: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """Some calls of a function as one graph; it runs three times before, on a stream of its own."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """The time of one of the ``count`` calls of a graph."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end)) / count
