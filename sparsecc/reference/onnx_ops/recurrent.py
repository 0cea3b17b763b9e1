"""RNN, GRU and LSTM, in one or two directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.errors import UnsupportedModel
from sparsecc.reference.onnx_ops.registry import Ctx, op

Activation = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _activation(name: str, alpha: float | None, beta: float | None) -> Activation:
    """A named activation with its parameters, or the defaults of the specification."""

    def either(value: float | None, default: float) -> float:
        return default if value is None else value

    table: dict[str, Activation] = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "affine": lambda x: either(alpha, 1.0) * x + either(beta, 0.0),
        "leakyrelu": lambda x: F.leaky_relu(x, either(alpha, 0.01)),
        "thresholdedrelu": lambda x: torch.where(x > either(alpha, 1.0), x, torch.zeros_like(x)),
        "scaledtanh": lambda x: either(alpha, 1.0) * torch.tanh(either(beta, 1.0) * x),
        "hardsigmoid": lambda x: torch.clamp(either(alpha, 0.2) * x + either(beta, 0.5), 0, 1),
        "elu": lambda x: F.elu(x, either(alpha, 1.0)),
        "softsign": F.softsign,
        "softplus": F.softplus,
    }
    if name.lower() not in table:
        raise UnsupportedModel(f"activation {name!r} in a recurrent node")
    return table[name.lower()]


def _activations(ctx: Ctx, default: Sequence[str], directions: int) -> list[list[Activation]]:
    """The activations of each direction."""
    names = ctx.texts("activations") or list(default) * directions
    alphas: list[float | None] = [*(ctx.reals("activation_alpha") or [])]
    betas: list[float | None] = [*(ctx.reals("activation_beta") or [])]
    alphas += [None] * (len(names) - len(alphas))
    betas += [None] * (len(names) - len(betas))
    made = [_activation(*item) for item in zip(names, alphas, betas, strict=False)]
    each = len(default)
    return [made[k * each : (k + 1) * each] for k in range(directions)]


@dataclass(slots=True)
class _Run:
    """The inputs of a recurrent node that all kinds share, time first."""

    x: Tensor
    lengths: list[int] | None
    directions: int
    hidden: int
    reversed_first: bool

    @property
    def batch(self) -> int:
        return self.x.shape[1]


def _prepare(ctx: Ctx, x: Tensor, r: Tensor, lengths: Tensor | None) -> _Run:
    if ctx.integer("layout"):
        x = x.transpose(0, 1)
    direction = ctx.text("direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    hidden = ctx.integer("hidden_size", r.shape[-1])
    if r.shape[-1] != hidden or r.shape[0] != directions:
        raise ValueError(
            f"hidden_size {hidden}, direction {direction}, but recurrence weights {list(r.shape)}"
        )
    known = None
    if lengths is not None and not x.is_meta:
        found = ctx.int_list(lengths)
        known = None if all(length == x.shape[0] for length in found) else found
    return _Run(x, known, directions, hidden, direction == "reverse")


def _state(run: _Run, ctx: Ctx, initial: Tensor | None) -> Tensor:
    shape = (run.directions, run.batch, run.hidden)
    if initial is None:
        return run.x.new_zeros(shape)
    state = initial.transpose(0, 1) if ctx.integer("layout") else initial
    if tuple(state.shape) != shape:
        raise ValueError(f"an initial state of shape {list(state.shape)}, not {list(shape)}")
    return state


def _clip(ctx: Ctx) -> Activation:
    bound = ctx.real("clip", 0.0)
    return (lambda x: x.clamp(-bound, bound)) if bound > 0 else (lambda x: x)


def _scan(
    run: _Run, backwards: bool, states: tuple[Tensor, ...], step: Step
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one direction: hidden states [T,N,H] in input order, and the last states."""
    steps = run.x.shape[0]
    outputs: list[Tensor] = [run.x.new_zeros(run.batch, run.hidden)] * steps
    alive = None if run.lengths is None else torch.tensor(run.lengths)
    for t in reversed(range(steps)) if backwards else range(steps):
        new = step(run.x[t], states)
        if alive is None:
            states, outputs[t] = new, new[0]
            continue
        active = (alive > t)[:, None]
        states = tuple(torch.where(active, a, b) for a, b in zip(new, states, strict=True))
        outputs[t] = torch.where(active, new[0], torch.zeros_like(new[0]))
    return torch.stack(outputs) if steps else run.x.new_zeros(0, run.batch, run.hidden), states


def _collect(
    ctx: Ctx, run: _Run, initial: list[Tensor], step_of: Callable[[int], Step]
) -> tuple[Tensor, ...]:
    """All directions: y[T,D,N,H] and the last states [D,N,H], with ``layout`` applied."""
    if run.x.is_meta:
        y = run.x.new_empty(run.x.shape[0], run.directions, run.batch, run.hidden)
        last = [run.x.new_empty(run.directions, run.batch, run.hidden) for _ in initial]
    else:
        ys: list[Tensor] = []
        lasts: list[tuple[Tensor, ...]] = []
        for d in range(run.directions):
            backwards = run.reversed_first or d == 1
            found, states = _scan(run, backwards, tuple(state[d] for state in initial), step_of(d))
            ys.append(found)
            lasts.append(states)
        y = torch.stack(ys, 1)
        last = [torch.stack([states[k] for states in lasts]) for k in range(len(initial))]
    if ctx.integer("layout"):
        y = y.permute(2, 0, 1, 3)
        last = [state.transpose(0, 1) for state in last]
    return (y, *last)


def _biases(run: _Run, b: Tensor | None, gates: int) -> tuple[Tensor, Tensor]:
    if b is None:
        zero = run.x.new_zeros(run.directions, gates * run.hidden)
        return zero, zero
    return b[:, : gates * run.hidden], b[:, gates * run.hidden :]


@op("RNN")
def rnn(
    ctx: Ctx,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x[T,N,I] w[D,H,I] r[D,H,H] b[D,2H] lengths[N] h[D,N,H] -> y[T,D,N,H] h[D,N,H]"""
    run = _prepare(ctx, x, r, lengths)
    functions = _activations(ctx, ["Tanh"], run.directions)
    wb, rb = _biases(run, b, 1)
    clip = _clip(ctx)

    def step_of(d: int) -> Step:
        def step(xt: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (functions[d][0](clip(xt @ w[d].T + states[0] @ r[d].T + wb[d] + rb[d])),)

        return step

    return _collect(ctx, run, [_state(run, ctx, initial_h)], step_of)


@op("GRU")
def gru(
    ctx: Ctx,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x[T,N,I] w[D,3H,I] r[D,3H,H] b[D,6H] lengths[N] h[D,N,H] -> y[T,D,N,H] h[D,N,H]; gates z, r, h."""
    run = _prepare(ctx, x, r, lengths)
    functions = _activations(ctx, ["Sigmoid", "Tanh"], run.directions)
    wb, rb = _biases(run, b, 3)
    clip = _clip(ctx)
    h3, before = run.hidden, ctx.flag("linear_before_reset")

    def step_of(d: int) -> Step:
        f, g = functions[d]

        def step(xt: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = states[0]
            from_x = xt @ w[d].T + wb[d]
            from_h = hidden @ r[d, : 2 * h3].T + rb[d, : 2 * h3]
            gates = f(clip(from_x[:, : 2 * h3] + from_h))
            update, reset = gates[:, :h3], gates[:, h3:]
            candidate_r, candidate_b = r[d, 2 * h3 :].T, rb[d, 2 * h3 :]
            if before:
                carried = reset * (hidden @ candidate_r + candidate_b)
            else:
                carried = (reset * hidden) @ candidate_r + candidate_b
            candidate = g(clip(from_x[:, 2 * h3 :] + carried))
            return ((1 - update) * candidate + update * hidden,)

        return step

    return _collect(ctx, run, [_state(run, ctx, initial_h)], step_of)


@op("LSTM")
def lstm(
    ctx: Ctx,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x[T,N,I] w[D,4H,I] r[D,4H,H] b[D,8H] lengths[N] h[D,N,H] c[D,N,H] p[D,3H]
    -> y[T,D,N,H] h[D,N,H] c[D,N,H]; gates i, o, f, c, peepholes i, o, f."""
    run = _prepare(ctx, x, r, lengths)
    functions = _activations(ctx, ["Sigmoid", "Tanh", "Tanh"], run.directions)
    wb, rb = _biases(run, b, 4)
    clip = _clip(ctx)
    peep = run.x.new_zeros(run.directions, 3 * run.hidden) if p is None else p

    def step_of(d: int) -> Step:
        f, g, h = functions[d]
        p_in, p_out, p_forget = peep[d].chunk(3)

        def step(xt: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, cell = states
            gates = xt @ w[d].T + hidden @ r[d].T + wb[d] + rb[d]
            i, o, forget, c = gates.chunk(4, 1)
            i = f(clip(i + p_in * cell))
            forget = 1 - i if ctx.flag("input_forget") else f(clip(forget + p_forget * cell))
            cell = forget * cell + i * g(clip(c))
            return f(clip(o + p_out * cell)) * h(cell), cell

        return step

    initial = [_state(run, ctx, initial_h), _state(run, ctx, initial_c)]
    return _collect(ctx, run, initial, step_of)
