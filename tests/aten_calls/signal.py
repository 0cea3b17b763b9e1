"""Calls that work along some axes as a whole: transforms, windows, samplers, quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.aten_calls.site import ALL, LAST, Row, Site, apart, aten, each, roomy

#: transforms that want complex numbers, and those that want the half of them that real ones give
_COMPLEX = frozenset(["fft_ifft", "fft_ifft2", "fft_ifftn"])
_HALF = frozenset(["fft_irfft", "fft_irfft2", "fft_irfftn", "fft_hfft", "fft_hfft2", "fft_hfftn"])


def _complex(x: Tensor) -> Tensor:
    return aten.complex(x, torch.sin(x))  # type: ignore[no-any-return]


def _real(y: Tensor) -> Tensor:
    """Real and imaginary part added: no square root, which has no slope at zero."""
    return aten.view_as_real(y.resolve_conj()).sum(-1) if y.is_complex() else y


def _read(s: Site, name: str, dim: int) -> Tensor:
    """What a transform reads; one number is half of no signal, so that it gets a second along ``dim``."""
    alone = name in _HALF and s.x.shape[dim] == 1
    x = torch.cat([s.x, torch.cos(s.x)], dim) if alone else s.x
    return _complex(x) if name in _COMPLEX | _HALF else x


def _along(s: Site, name: str) -> Any:
    norm = s.pick((None, "ortho"))
    dim = s.pick((s.channel, -1, 1))
    return _real(getattr(aten, name)(_read(s, name, dim), None, dim, norm))


def _several(s: Site, name: str) -> Any:
    dims = s.pick(([-1], [-2, -1], [1])) if s.x.dim() > 2 else [-1]
    x = _read(s, name, dims[-1])
    return _real(getattr(aten, name)(x, None, dims, s.pick((None, "ortho"))))


def _shifted(s: Site, name: str) -> Any:
    return getattr(aten, name)(s.x, s.pick(([s.channel], [-1], [1])))


def _stft(s: Site) -> Any:
    if s.width < 4:
        return s.x
    window = s.net.buffer(torch.hann_window(4))
    made = aten.stft(s.x, 4, 2, 4, window, False, s.pick((True, False)), s.pick((True, False)))
    return _real(made) if made.is_complex() else made


def _istft(s: Site) -> Any:
    if s.width < 4:
        return s.x
    window = s.net.buffer(torch.ones(4))
    wide = aten.stft.center(s.x, 4, 1, 4, window, True, "reflect", False, True, True)
    return aten.istft(wide, 4, 1, 4, window, True, False, True)


def _windows(s: Site, name: str) -> Any:
    dim = s.pick((s.channel, 1))
    made = getattr(aten, name)(s.x, dim, min(2, int(s.x.shape[dim])), s.pick((1, 2)))
    return made.amax(-1)


def _columns(s: Site) -> Any:
    return aten.im2col(s.x, [1, 1], [1, 1], [0, 0], [1, 1]).reshape(s.x.shape)


def _from_columns(s: Site) -> Any:
    size = [int(n) for n in s.x.shape[2:]]
    wide = torch.relu(aten.im2col(s.x, [2, 2], [1, 1], [1, 1], [1, 1]))
    return aten.col2im(wide, size, [2, 2], [1, 1], [1, 1], [1, 1])


def _affine(s: Site, rank: int) -> Tensor:
    theta = s.net.weight(1, rank, rank + 1).expand(s.x.shape[0], -1, -1)
    return aten.affine_grid_generator(theta, [s.x.shape[0], 1, *[2] * rank], s.pick((True, False)))  # type: ignore[no-any-return]


def _sampled(s: Site, name: str) -> Any:
    grid = _affine(s, s.spatial)
    return getattr(aten, name)(s.x, grid, s.pick((0, 1)), s.pick((0, 1)), s.pick((True, False)))


def _unpooled(s: Site) -> Any:
    x = roomy(apart(s))
    name, n = ("max_pool2d_with_indices", 2) if s.spatial == 2 else ("max_pool3d_with_indices", 3)
    values, places = getattr(aten, name)(x, [2] * n, [2] * n)
    size = [int(d) for d in x.shape[2:]]
    if n == 2:
        return aten.max_unpool2d(values, places, size)
    return aten.max_unpool3d(values, places, size, [2] * n, [0] * n)


RECIPES: dict[str, Row] = {
    **each(ALL, _along, "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"),
    **each(ALL, _several, "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2"),
    **each(ALL, _several, "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn"),
    **each(ALL, _shifted, "fft_fftshift fft_ifftshift"),
    "linalg_matrix_norm": (
        LAST,
        lambda s: s.x * aten.linalg_matrix_norm.str_ord(s.net.weight(s.width, 3), "fro", [0, 1], False),
    ),
    "stft": (["table"], _stft),
    "istft": (["table"], _istft),
    **each(ALL, _windows, "unfold unfold_copy"),
    "im2col": (["image"], _columns),
    "col2im": (["image"], _from_columns),
    **each(["image"], _sampled, "grid_sampler grid_sampler_2d"),
    "grid_sampler_3d": (["volume"], lambda s: _sampled(s, "grid_sampler_3d")),
    "affine_grid_generator": (["image"], lambda s: s.x * torch.tanh(_affine(s, 2)).mean()),
    "view_as_real": (ALL, lambda s: aten.view_as_real(_complex(s.x)).amax(-1)),
    "view_as_complex": (ALL, lambda s: _real(aten.view_as_complex(torch.stack([s.x, torch.sin(s.x)], -1)))),
    "complex": (ALL, lambda s: _real(_complex(s.x) * _complex(torch.cos(s.x)))),
    "polar": (ALL, lambda s: _real(aten.polar(torch.exp(s.x * 0.1), s.x))),
    "conj": (ALL, lambda s: _real(aten.conj(_complex(s.x)) * _complex(s.x))),
    "imag": (ALL, lambda s: aten.imag(_complex(s.x) * _complex(torch.cos(s.x)))),
    "matrix_H": (["table"], lambda s: _real(aten.matrix_H(_complex(s.x)).t())),
    "max_unpool2d": (["image"], _unpooled),
    "max_unpool3d": (["volume"], _unpooled),
    "bucketize": (ALL, lambda s: aten.bucketize(s.x, s.net.buffer(torch.tensor([-0.3, 0.1, 0.6])))),
    "isin": (ALL, lambda s: aten.isin(torch.floor(apart(s) * 2), s.net.buffer(torch.tensor([-1.0, 0.0])))),
    "fliplr": (ALL, lambda s: aten.fliplr(s.x)),
    "flipud": (ALL, lambda s: aten.flipud(s.x)),
}  # fmt: skip
