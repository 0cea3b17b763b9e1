"""Nodes of ONNX operators whose operands have forms of their own: places, grids, regions, windows, caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import numpy_helper

if TYPE_CHECKING:
    from tests.test_onnx_property import Net, Value

Recipe = Callable[["Net", str], None]


def joined(net: Net, v: Value, out: str) -> None:
    """A result that broadcasts to the value."""
    net.put("Add", [net.graph.node("Tanh", [out], net.fresh("tame")), v.name], v.shape)


def _batched(net: Net, v: Value, values: Any, dtype: Any = np.float32) -> str:
    """A constant [1,*] for every sample of a value: [N,*]."""
    stored = net.graph.tensor(net.fresh("one"), values, dtype)
    shape = net.graph.node("Shape", [v.name], net.fresh("shape"))
    count = net.graph.node("Slice", [shape, net.ints(0), net.ints(1)], net.fresh("count"))
    full = net.graph.node("Concat", [count, net.ints(*np.shape(values)[1:])], net.fresh("full"), axis=0)
    return net.graph.node("Expand", [stored, full], net.fresh("each"))


def _summed(net: Net, x: str, *axes: int) -> str:
    """Mean over axes, which stay with size 1."""
    if net.graph.opset >= 18:
        return net.graph.node("ReduceMean", [x, net.ints(*axes)], net.fresh("mean"), keepdims=1)
    return net.graph.node("ReduceMean", [x], net.fresh("mean"), axes=list(axes), keepdims=1)


def _dropped_last(net: Net, x: str) -> str:
    if net.graph.opset >= 18:
        return net.graph.node("ReduceMax", [x, net.ints(-1)], net.fresh("top"), keepdims=0)
    return net.graph.node("ReduceMax", [x], net.fresh("top"), axes=[-1], keepdims=0)


# -- places -------------------------------------------------------------------------------------------


def _compress(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    at = net.channel(len(v.shape))
    stays = np.array([(net.number + i) % 3 != 1 for i in range(v.shape[at])])
    stays[0] = True
    test = net.graph.tensor(net.fresh("stays"), stays, bool)
    shape = tuple(int(stays.sum()) if d == at else n for d, n in enumerate(v.shape))
    net.put(name, [v.name, test], shape, axis=at)


def _scatter_elements(net: Net, name: str) -> None:
    if net.pick((True, False)):
        _scatter_one_place(net, name)
        return
    v = net.pick(net.values[-4:])
    at = net.channel(len(v.shape))
    count = net.pick(range(1, v.shape[at] + 1))
    shape = [count if d == at else 1 for d in range(len(v.shape))]
    start = net.pick(range(v.shape[at]))
    places = (np.arange(count) + start) % v.shape[at]
    inputs = [
        v.name,
        net.graph.tensor(net.fresh("places"), places.reshape(shape), np.int64),
        net.graph.tensor(net.fresh("values"), net.graph.random.uniform(-1, 1, shape)),
    ]
    how = net.pick(("none", "add", "mul", "max") if net.graph.opset >= 18 else ("none",))
    net.put(name, inputs, v.shape, axis=at, **({} if how == "none" else {"reduction": how}))


def _scatter_one_place(net: Net, name: str) -> None:
    """One position of an axis is written in every row: its number, made as large as what is written."""
    v = net.pick(net.values[-4:])
    at = net.pick(range(1, len(v.shape)))
    place = net.graph.tensor(net.fresh("place"), net.pick(range(v.shape[at])), np.int64)
    new = net.graph.node("Sin", [_summed(net, v.name, at)], net.fresh("new"))
    spread = net.graph.node(
        "Expand", [place, net.graph.node("Shape", [new], net.fresh("shape"))], net.fresh("at")
    )
    net.put(name, [v.name, spread, new], v.shape, axis=at)


def _scatter_nd(net: Net, name: str) -> None:
    """Channels of every sample are written: the first and the last, or neighbours."""
    v = net.pick([u for u in net.values[-6:] if u.shape[1] > 1] or net.values[:1])
    order = [1, 0, *range(2, len(v.shape))]
    turned = net.graph.node("Transpose", [v.name], net.fresh("turned"), perm=order)
    start, stop = sorted((net.pick(range(v.shape[1])), net.pick(range(v.shape[1]))))
    chosen = net.pick(([0, v.shape[1] - 1], list(range(start, stop + 1))))
    rows = net.graph.tensor(net.fresh("rows"), [[row] for row in chosen], np.int64)
    read = net.graph.node("GatherND", [turned, rows], net.fresh("read"))
    new = net.graph.node("Sin", [read], net.fresh("new"))
    written = net.graph.node(name, [turned, rows, new], net.fresh("written"))
    net.put("Transpose", [written], v.shape, perm=order)


def _reverse_sequence(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    lengths = _batched(net, v, [net.pick(range(1, v.shape[1] + 1))], np.int64)
    net.put(name, [v.name, lengths], v.shape, batch_axis=0, time_axis=1)


# -- images -------------------------------------------------------------------------------------------


def _center_crop_pad(net: Net, name: str) -> None:
    v = net.value()
    if v is None or max(v.shape[2:]) > 8:
        return
    height, width = v.shape[2] + 1, max(1, v.shape[3] - 1)
    net.put(name, [v.name, net.ints(height, width)], (*v.shape[:2], height, width), axes=[2, 3])


def _col2im(net: Net, name: str) -> None:
    """Columns of one place, or of two neighbours, which then add up."""
    v = net.value()
    if v is None or max(v.shape[2:]) > 8:
        return
    channels, height, width = v.shape[1:]
    block = 2 if channels % 2 == 0 and net.pick((True, False)) else 1
    sizes = net.ints(0, channels, height * width)
    columns = net.graph.node("Reshape", [v.name, sizes], net.fresh("columns"))
    image = (height, width + block - 1)
    inputs = [columns, net.ints(*image), net.ints(1, block)]
    net.put(name, inputs, (v.shape[0], channels // block, *image))


def _grid_sample(net: Net, name: str) -> None:
    v = net.value()
    if v is None:
        return
    grid = _batched(net, v, net.graph.random.uniform(-1, 1, (1, 3, 2, 2)))
    linear = "linear" if net.graph.opset >= 20 else "bilinear"
    given = {"mode": net.pick((linear, "nearest")), "padding_mode": net.pick(("zeros", "border"))}
    net.put(name, [v.name, grid], (*v.shape[:2], 3, 2), **given)


def _lrn(net: Net, name: str) -> None:
    v = net.value()
    if v is not None:
        net.put(name, [v.name], v.shape, size=net.pick((1, 3)), alpha=0.3, beta=0.5)


def _mean_variance(net: Net, name: str) -> None:
    v = net.value()
    if v is not None and min(v.shape[2:]) > 1:
        net.put(name, [v.name], v.shape, axes=net.pick(([2, 3], [0, 2, 3])))


def _regions(net: Net, name: str) -> None:
    """Regions of both images of the batch; their mean gates every sample."""
    v = net.value()
    if v is None:
        return
    boxes = np.array([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
    rois = [net.graph.tensor(net.fresh("boxes"), boxes), net.ints(0, 1)]
    given: dict[str, Any] = {"output_height": 2, "output_width": 2, "sampling_ratio": 1}
    found = net.graph.node(
        name, [v.name, *rois], net.fresh("regions"), **given, mode=net.pick(("avg", "max"))
    )
    joined(net, v, _summed(net, found, 0, 2, 3))


def _det(net: Net, name: str) -> None:
    v = net.value()
    if v is None or v.shape[2] != v.shape[3] or v.shape[2] > 4 or net.graph.opset < 13:
        return
    found = net.graph.node(name, [v.name], net.fresh("det"))
    joined(net, v, net.graph.node("Unsqueeze", [found, net.ints(2, 3)], net.fresh("up")))


# -- signals ------------------------------------------------------------------------------------------


def _window(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    size = net.graph.tensor(net.fresh("size"), v.shape[-1], np.int64)
    joined(net, v, net.graph.node(name, [size], net.fresh("window"), periodic=net.pick((0, 1))))


def _dft(net: Net, name: str) -> None:
    """Along the channels or the last axis; the larger of real and imaginary part."""
    v = net.pick(net.values[-4:])
    axis = net.pick((net.channel(len(v.shape)), len(v.shape) - 1))
    one = net.graph.node("Unsqueeze", [v.name, net.ints(len(v.shape))], net.fresh("one"))
    if net.graph.opset >= 20:
        at = net.graph.tensor(net.fresh("axis"), axis, np.int64)
        found = net.graph.node(name, [one, "", at], net.fresh("spectrum"))
    else:
        found = net.graph.node(name, [one], net.fresh("spectrum"), axis=axis)
    joined(net, v, _dropped_last(net, found))


def _stft(net: Net, name: str) -> None:
    """Of everything of a sample in a row; the mean of the spectrum is a gate."""
    v = net.pick(net.values[-4:])
    if int(np.prod(v.shape[1:])) < 4:
        return
    row = net.graph.node("Flatten", [v.name], net.fresh("row"))
    step, length = (net.graph.tensor(net.fresh("n"), n, np.int64) for n in (2, 4))
    wave = net.graph.node("Unsqueeze", [row, net.ints(2)], net.fresh("wave"))
    sides = net.pick((0, 1))  # by default 1, which shape inference takes for 0
    found = net.graph.node(name, [wave, step, "", length], net.fresh("spectrum"), onesided=sides)
    mean = net.graph.node("Squeeze", [_summed(net, found, 1, 2, 3), net.ints(1, 2, 3)], net.fresh("mean"))
    shape = net.ints(-1, *[1] * (len(v.shape) - 1))
    joined(net, v, net.graph.node("Reshape", [mean, shape], net.fresh("gate")))


def _constant(net: Net, name: str) -> None:
    v = net.pick(net.values[-4:])
    values = net.graph.random.uniform(-1, 1, v.shape[-1]).astype(np.float32)
    joined(net, v, net.graph.node(name, [], net.fresh("constant"), value=numpy_helper.from_array(values)))


# -- attention ----------------------------------------------------------------------------------------


def _attention(net: Net, name: str) -> None:
    """Channels as heads, rows as tokens."""
    v = net.value()
    if v is None:
        return
    key = net.graph.node("Sin", [v.name], net.fresh("key"))
    given = net.pick(({}, {"is_causal": 1}, {"scale": 0.4}))
    joined(net, v, net.graph.node(name, [v.name, key, v.name], net.fresh("mixed"), **given))


def _rotary(net: Net, name: str) -> None:
    """Channels as heads, rows as tokens, columns as pairs."""
    v = net.value()
    if v is None or v.shape[3] % 2:
        return
    angles = net.graph.random.uniform(0, 1, (v.shape[2], v.shape[3] // 2))
    tables = [net.graph.tensor(net.fresh("table"), f(angles)) for f in (np.cos, np.sin)]
    places = _batched(net, v, np.arange(v.shape[2])[None], np.int64)
    net.put(name, [v.name, *tables, places], v.shape, interleaved=net.pick((0, 1)))


RECIPES: dict[str, Recipe] = {
    "Attention": _attention, "RotaryEmbedding": _rotary, "CenterCropPad": _center_crop_pad,
    "Col2Im": _col2im, "Compress": _compress, "Constant": _constant, "DFT": _dft, "Det": _det,
    "GridSample": _grid_sample, "LRN": _lrn, "MeanVarianceNormalization": _mean_variance,
    "ReverseSequence": _reverse_sequence, "ScatterElements": _scatter_elements, "ScatterND": _scatter_nd,
    "STFT": _stft, "RoiAlign": _regions,
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), _window),
}  # fmt: skip
