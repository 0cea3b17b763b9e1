"""The object that attaches to a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sparsecc.axes.analysis import Analysis
from sparsecc.axes.terms import Keep
from sparsecc.errors import InvalidOption, VerificationFailed
from sparsecc.fx.capture import unwrap
from sparsecc.lowering import lower
from sparsecc.pipeline import finish as settled
from sparsecc.pipeline import open_subject
from sparsecc.plan import Mask, Plan, Skip
from sparsecc.report import Report
from sparsecc.selection import check_names
from sparsecc.subject import Subject
from sparsecc.train import checkpoint, scores, snapshots
from sparsecc.train.choosing import Chosen, Method, Pattern, Update
from sparsecc.train.elements import NM, Unstructured
from sparsecc.train.optimizers import clear, unwrapped
from sparsecc.train.penalties import Penalties, Place
from sparsecc.train.regularisers import Regulariser
from sparsecc.train.schedules import Schedule
from sparsecc.train.shards import agreed, is_sharded, joined, local, part, whole
from sparsecc.train.sites import Site, from_analysis, from_names, parameters, require_held
from sparsecc.train.slimming import rebind, require_plain
from sparsecc.train.snapshots import Snapshot
from sparsecc.train.state import State
from sparsecc.train.structured import Structured, members, soft
from sparsecc.verification import Certificate

#: text form -> pattern; anything else is read as N:M
PATTERNS: dict[str, Callable[[], Pattern]] = {
    "unstructured": Unstructured,
    "global": lambda: Unstructured("global"),
    "erk": lambda: Unstructured("erk"),
    "er": lambda: Unstructured("er"),
    "channels": Structured,
}
Rewound = Literal["weights", "learning_rate"]


@dataclass(frozen=True)
class Slimmed:
    """A smaller model, the optimizer that now moves it, and what made and checked it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: Plan
    certificate: Certificate
    report: Report


class Sparsifier:
    """Keeps a model sparse, and makes it sparser, while an ordinary loop trains it.

    Call ``step()`` after every ``optimizer.step()``; that is all.  What happens around it: before the
    optimizer steps (a hook of the optimizer sees to that; call ``before_step()`` yourself where gradients
    are clipped or where the optimizer is given a closure) penalties are added to gradients, and those of
    masked weights are zeroed.  After it, masked weights are zero, exactly, and so is everything of their
    shape that the optimizer remembers of them (momentum, exp_avg, exp_avg_sq): a weight that grows again
    starts from nothing.  ``step()`` without a step of the optimizer does nothing, so that gradients may be
    accumulated.

    ``schedule``: when masks are chosen, and how sparse they are.  ``pattern``: ``Unstructured``, ``NM``,
    ``Structured``, or text: unstructured, global, erk, er, N:M, channels.  ``method``: ``SET``, ``RigL``,
    ``SRSTE``; without one, what scores lowest goes and stays away.  ``saliency``: magnitude, movement,
    random, or a function of a parameter's name and tensor.  ``regularisers``: ``L1``, ``GroupLasso``,
    ``Growing``; with ``penalties="loss"`` you add ``penalty()`` to the loss yourself.

    Which weights: those that the captured graph multiplies and sums (``example_inputs``, or an
    ``analysis`` made before the model was sharded), less what ``include`` and ``exclude`` say; or exactly
    ``weights``.  ``skips`` tells what was left alone and why.  Create it after the model is on its device
    and wrapped, and after the optimizer.  ``state`` goes on from a ``state_dict()`` for a model and
    optimizer that have been loaded already.

    Raises InvalidOption for options that do not fit each other or the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        schedule: Schedule,
        pattern: Pattern | str = "unstructured",
        method: Method | None = None,
        saliency: str | scores.Scorer = "magnitude",
        regularisers: Iterable[Regulariser] = (),
        penalties: Place = "gradient",
        example_inputs: Any = None,
        analysis: Analysis | None = None,
        weights: Sequence[str] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        scores.check(saliency)
        check_names(include, exclude)
        self.model, _ = unwrap(model)
        self.optimizer = unwrapped(optimizer)
        self.schedule, self.saliency = schedule, saliency
        self.pattern = _pattern(pattern)
        self.method = method or Method()
        self.example_inputs = example_inputs
        self.skips: tuple[Skip, ...] = ()
        self._group = _process_group(model)
        self._sharded = any(is_sharded(p) for p in self.model.parameters())
        self._analysis: Analysis | None = None
        self.sites = self._find(analysis, weights, include, exclude)
        require_held(self.sites, self.optimizer)
        self.pattern.check(schedule, self.sites)
        self.method.check(self.pattern, schedule)
        self._penalties = Penalties(regularisers, penalties, self.model, self.sites, self._analysis)
        self._state = self._fresh(seed)
        self._dense: dict[str, torch.Tensor] = {}
        self._prepared = self._pending = self._closure = False
        if state is not None:
            self.load_state_dict(state)
        elif schedule.updates(0):
            self._update()
        self._depth = 0
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._before_optimizer),
            self.optimizer.register_step_post_hook(self._after_optimizer),
        )

    # -- what is trained ------------------------------------------------------------------------

    @property
    def _structured(self) -> bool:
        return self.pattern.structured

    def _find(
        self,
        analysis: Analysis | None,
        weights: Sequence[str] | None,
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> tuple[Site, ...]:
        if weights is not None and (include or exclude or self._structured):
            raise InvalidOption(
                "weights names exactly the parameters that get masks: give it without include and exclude, "
                "and not for structured patterns, which need example_inputs"
            )
        subject: Subject | None = None
        if analysis is None and self.example_inputs is not None:
            if self._sharded:
                raise InvalidOption(
                    "the model is sharded already and cannot be captured; give "
                    "analysis=sparsecc.analyze(model, example_inputs), made before fully_shard()"
                )
            subject = open_subject(self.model, self.example_inputs)
            analysis = subject.analysis
        if analysis is None and weights is None:
            raise InvalidOption(
                "which weights are to become sparse?  Give example_inputs, so that the model can be "
                "captured, or weights=[names of parameters]"
            )
        self._analysis = analysis
        if weights is not None:
            sites = from_names(self.model, weights, analysis)
        elif isinstance(self.pattern, Structured):
            assert analysis is not None
            self._analysis, skips = soft(analysis, self.pattern, include, exclude, subject)
            self.skips = tuple(skips)
            named = parameters(self.model)
            sites = [Site(n, named[n], None) for n in members(self._analysis.groups)]
        else:
            assert analysis is not None
            found, skips = from_analysis(self.model, analysis, include, exclude)
            reasons = {site.name: self.pattern.why_not(site) for site in found}
            sites = [site for site in found if not reasons[site.name]]
            self.skips = (*skips, *(Skip(name, why) for name, why in reasons.items() if why))
        if not sites:
            told = "; ".join(f"{s.where}: {s.reason}" for s in self.skips[:5])
            raise InvalidOption(f"no weight can be made sparse.  {told or 'The list of weights is empty.'}")
        return tuple(sites)

    def _fresh(self, seed: int) -> State:
        """Everything is there, and nothing has happened."""
        masks = {n: torch.ones_like(local(p), dtype=torch.bool) for n, p in self._parameters.items()}
        state = State(masks, torch.Generator().manual_seed(seed))
        if self.method.latent:
            state.latents = self._copies()
        if self.saliency == "movement":
            state.moved = {n: torch.zeros_like(m, dtype=torch.float32) for n, m in masks.items()}
        if self._structured and self._analysis is not None:
            state.groups = {g.name: np.ones(g.size, bool) for g in self._analysis.groups}
        return state

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return {s.name: s.parameter for s in self.sites}

    def _part(self, whole_mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of a mask on which all processes agree."""
        return part(agreed(whole_mask, self._group), like)

    @property
    def count(self) -> int:
        """Optimizer steps done."""
        return self._state.count

    @property
    def saved(self) -> Snapshot | None:
        """The snapshot; None forgets it."""
        return self._state.saved

    @saved.setter
    def saved(self, snapshot: Snapshot | None) -> None:
        self._state.saved = snapshot

    def _copies(self) -> dict[str, torch.Tensor]:
        return {n: local(p).clone() for n, p in self._parameters.items()}

    # -- around the optimizer's step ----------------------------------------------------------------

    @torch.no_grad()
    def before_step(self) -> None:
        """Prepare gradients for the optimizer: once between two of its steps, after the last backward pass.

        Calls itself unless the optimizer is given a closure; then call it at the end of the closure.
        """
        if self._prepared:
            return
        for site in self.sites:
            gradient = site.parameter.grad
            if gradient is None:
                continue
            if self.method.gradients and self.schedule.updates(self.count + 1):
                self._dense[site.name] = local(gradient).clone()
            if self._state.moved:
                scores.moved(self._state.moved[site.name], local(site.parameter), local(gradient))
        self._penalties.add(self.count, self._candidates())
        for site in self.sites:
            if site.parameter.grad is not None:
                gradient, latent = local(site.parameter.grad), self._state.latents.get(site.name)
                self.method.correct(gradient, self._state.masks[site.name], latent)
        self._prepared = True
        if self._closure:
            self._expose()

    def _before_optimizer(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:  # a subclass whose step() calls that of its base
            return
        if self._pending:
            self._depth = 0
            raise InvalidOption(
                "the optimizer stepped twice without sparsifier.step(), so masked weights are not zero; call "
                "sparsifier.step() after every optimizer.step(), or sparsifier.close() to let go of the model"
            )
        if getattr(optimizer, "grad_scale", None) is not None and self._reads_gradients:
            self._depth = 0
            raise InvalidOption(
                "gradients are still scaled, and this Sparsifier adds to them or reads them; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        given = (*args, *kwargs.values())  # the optimizer itself comes first
        self._closure = any(callable(a) for a in given if a is not optimizer)
        self._pending = True
        if not self._closure:
            self.before_step()
            self._expose()

    def _after_optimizer(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1

    @property
    def _reads_gradients(self) -> bool:
        """Whether the size of gradients matters, and not only which of them are zero."""
        return self.method.latent or bool(self._state.moved) or self._penalties.adds

    @torch.no_grad()
    def _expose(self) -> None:
        """Put latent weights in place for the optimizer."""
        for site in self.sites:
            if site.name in self._state.latents:
                local(site.parameter).copy_(self._state.latents[site.name])

    @torch.no_grad()
    def step(self) -> bool:
        """Zero what is masked, and choose new masks where the schedule says so; whether it did.

        To be called after every ``optimizer.step()``; does nothing where the optimizer did not step.
        """
        if not self._pending:
            self._prepared = False
            return False
        if self._closure and not self._prepared:
            raise InvalidOption(
                "the optimizer was given a closure, in which gradients are computed; call "
                "sparsifier.before_step() at the end of it"
            )
        self._state.count += 1
        self._pending = self._prepared = self._closure = False
        self._depth = 0
        for site in self.sites:
            if site.name in self._state.latents:
                self._state.latents[site.name].copy_(local(site.parameter))
        self._penalties.shrink(self.count, self._candidates(), self._state.latents, self.optimizer)
        chosen = self.schedule.updates(self.count)
        self._apply()
        if chosen:
            self._update()
        self._dense = {}
        return chosen

    # -- masks ------------------------------------------------------------------------------------

    def _context(self, sparsity: float) -> Update:
        whole_masks, latent = self.masks, self.method.latent
        weights = {
            s.name: joined(self._state.latents[s.name], s.parameter) if latent else whole(s.parameter)
            for s in self.sites
        }
        return Update(
            sites=self.sites,
            scores={n: self._scores(n, w) for n, w in weights.items()},
            live={n: torch.ones_like(m) if latent else m for n, m in whole_masks.items()},
            sparsity=sparsity,
            step=self.count,
            schedule=self.schedule,
            generator=self._state.generator,
            gradients={
                s.name: joined(self._dense[s.name], s.parameter) for s in self.sites if s.name in self._dense
            },
            groups=self._state.groups,
            analysis=self._analysis,
            signed=self.saliency == "movement",
        )

    def _scores(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if self.saliency == "movement":
            site = next(s for s in self.sites if s.name == name)
            return joined(self._state.moved[name], site.parameter)
        if self.saliency == "random":
            return torch.rand(weight.shape, generator=self._state.generator).to(weight.device)
        scorer = self.saliency if callable(self.saliency) else scores.magnitude
        return scores.checked(name, scorer(name, weight), weight)

    @torch.no_grad()
    def _update(self) -> None:
        """Choose masks at the schedule's present target, and apply them."""
        sparsity = self.schedule.at(self.count)
        self._set(self.method.choose(self.pattern, self._context(sparsity)))
        self._apply()

    def _set(self, chosen: Chosen) -> None:
        for site in self.sites:
            mask = agreed(chosen.masks[site.name], self._group)
            self._state.masks[site.name] = part(mask, site.parameter)
            self._state.stays[site.name] = int(mask.sum())
        for name, kept in chosen.groups.items():
            device = self.sites[0].parameter.device
            self._state.groups[name] = (
                agreed(torch.from_numpy(kept.copy()).to(device), self._group).cpu().numpy()
            )

    @torch.no_grad()
    def _apply(self) -> None:
        """Zero masked weights, and what the optimizer remembers of them."""
        for site in self.sites:
            mask, latent = self._state.masks[site.name], self._state.latents.get(site.name)
            tensor = local(site.parameter)
            if latent is not None:
                tensor.copy_(latent)
            else:
                clear(self.optimizer, site.parameter, mask)
            tensor.masked_fill_(~mask, 0)

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Present masks by name, True where a weight stays.

        Those of sharded parameters are gathered: every process has to ask at the same time.
        """
        return {s.name: joined(self._state.masks[s.name], s.parameter) for s in self.sites}

    @property
    def groups(self) -> dict[str, Keep]:
        """Positions of coupled groups that stay, by the group's name (structured patterns)."""
        return dict(self._state.groups)

    @property
    def sparsity(self) -> float:
        """The share of all elements of parameters with masks that is masked now."""
        stays = self._state.stays
        left = sum(stays.get(s.name, s.size) for s in self.sites)
        return 1 - left / sum(s.size for s in self.sites)

    # -- penalties ----------------------------------------------------------------------------------

    def _candidates(self) -> dict[str, torch.Tensor]:
        """What ``Growing`` lets stay: chosen when it begins, at the schedule's final sparsity."""
        state = self._state
        if not state.candidates and self._penalties.begins(self.count):
            with torch.no_grad():
                chosen = self.pattern.choose(self._context(self.schedule.sparsity)).masks
            state.candidates = {n: self._part(chosen[n], p) for n, p in self._parameters.items()}
        return state.candidates

    def penalty(self) -> torch.Tensor:
        """The sum of all penalties, differentiable: to look at, or for the loss (``penalties="loss"``)."""
        return self._penalties.total(self.count, self._candidates())

    # -- rewinding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self, scheduler: Any = None) -> None:
        """Remember weights, optimizer and (where given) the learning-rate scheduler as they are now."""
        self._require_settled("snapshot()")
        self.saved = snapshots.taken_of(self.model, self.optimizer, scheduler, self.count)
        self.saved.tensors.update({n: t.clone() for n, t in self._state.latents.items()})

    @torch.no_grad()
    def rewind(self, what: Rewound = "weights", *, optimizer: bool = True, scheduler: Any = None) -> None:
        """Go back to the snapshot, with the present masks.

        ``weights``: weights, buffers and (with ``optimizer``) the optimizer's state as they were;
        ``learning_rate``: only learning rates, the weights stay as they are.  ``scheduler`` is put back in
        both cases.  The schedule of masks goes on.
        """
        self._require_settled("rewind()")
        if what not in ("weights", "learning_rate"):
            raise InvalidOption(f"what={what!r}: give 'weights' or 'learning_rate'")
        if self.saved is None:
            raise InvalidOption("there is nothing to rewind to; call snapshot() at the step to come back to")
        if scheduler is not None and not self.saved.scheduler:
            raise InvalidOption("the snapshot holds no scheduler; give it to snapshot(scheduler=...), too")
        if what == "weights":
            snapshots.restore_weights(self.saved, self.model)
            if optimizer:
                snapshots.restore_optimizer(self.saved, self.optimizer)
            self._state.latents = self._copies() if self._state.latents else {}
            self._apply()
        else:
            snapshots.restore_rates(self.saved, self.optimizer)
        if scheduler is not None:
            scheduler.load_state_dict(self.saved.scheduler)

    # -- the end ------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What the masks do, as a plan for the model as it is: masks of elements, or removed positions."""
        if isinstance(self.pattern, Structured):
            assert self._analysis is not None
            return self._lowered(self._analysis)
        masks = {n: m.cpu().numpy() for n, m in self.masks.items()}
        actions = tuple(Mask(n, m) for n, m in masks.items())
        shapes = {n: m.shape for n, m in masks.items()}
        return Plan(dialect="torch", actions=actions, shapes=shapes, recipe=str(self.pattern))

    def _lowered(self, analysis: Analysis) -> Plan:
        """Removal of masked positions, which changes nothing that the model computes: they are zero."""
        return lower(analysis, self._state.groups, by="Sparsifier", recipe=str(self.pattern), mode="slim")

    def finish(self) -> nn.Module:
        """Let go of the model: its masked weights are zero, and nothing is attached to it any more.

        With a structured pattern this is ``slim().model``.  Raises VerificationFailed where an N:M
        pattern does not hold, which would be a defect.
        """
        if self._structured:
            return self.slim().model
        self._require_settled("finish()")
        self._apply()
        if isinstance(self.pattern, NM) and self.count >= self.schedule.end:
            for site in self.sites:
                held = whole(site.parameter)
                values = (held if held.dtype == torch.float64 else held.float()).cpu().numpy()
                if not self.pattern.ratio.holds(values, site.axis or 0):
                    raise VerificationFailed(f"{site.name} does not have the pattern {self.pattern.pattern}")
        self.close()
        return self.model

    def slim(self, *, verify: bool = True) -> Slimmed:
        """Take masked positions out: a narrower model that computes the same, and the same optimizer for it.

        Training can go on with both as if nothing had happened; to prune further, attach a new Sparsifier.
        Raises what ``sparsecc.prune`` does; then nothing was changed.
        """
        if not self._structured or self.example_inputs is None:
            raise InvalidOption(
                "slim() takes out positions of coupled groups: it needs pattern=Structured(...) and "
                "example_inputs"
            )
        self._require_settled("slim()")
        require_plain(self.model)
        self._apply()
        subject = open_subject(self.model, self.example_inputs)
        result = settled(subject, self._lowered(subject.analysis), verify=verify)
        rebind(self.optimizer, self.model, result.model, result.plan)
        self.close()
        return Slimmed(result.model, self.optimizer, result.plan, result.certificate, result.report)

    def close(self) -> None:
        """Take the hooks off the optimizer; nothing is kept zero any more."""
        for hook in self._hooks:
            hook.remove()
        self._state.latents, self._pending, self._prepared = {}, False, False

    def _require_settled(self, what: str) -> None:
        if self._pending:
            raise InvalidOption(
                f"{what} between optimizer.step() and sparsifier.step(): call the latter first"
            )

    # -- storage ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that a later run needs to go on bit by bit, as one flat dict of tensors.

        It holds no objects: ``torch.save`` and safetensors can both store it.  The model and the
        optimizer are not part of it.
        """
        self._require_settled("state_dict()")
        return checkpoint.dumped(self._state, self.sites, self._description())

    def _description(self) -> dict[str, Any]:
        saliency = "function" if callable(self.saliency) else self.saliency
        return {"pattern": repr(self.pattern), "method": repr(self.method), "saliency": saliency}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a ``state_dict()``; the model and its optimizer may be loaded before or after.

        The schedule and the regularisers may have changed; pattern, method, saliency and weights may not:
        InvalidOption says what differs, and then nothing was changed.
        """
        checkpoint.load(self._state, self.sites, self._description(), state)
        self._dense, self._pending, self._prepared = {}, False, False
        self._apply()

    def __repr__(self) -> str:
        return (
            f"Sparsifier({len(self.sites)} weights, step {self.count}, sparsity {self.sparsity:.4f}, "
            f"{self.pattern!r}, {self.schedule!r})"
        )


def _pattern(given: Pattern | str) -> Pattern:
    if isinstance(given, Pattern):
        return given
    if given in PATTERNS:
        return PATTERNS[given]()
    try:
        return NM(given)
    except InvalidOption as error:
        raise InvalidOption(
            f"pattern={given!r} is not known; there are {', '.join(PATTERNS)} and N:M, such as 2:4"
        ) from error


def _process_group(model: nn.Module) -> Any:
    """The processes among which DistributedDataParallel keeps a model the same; None without it."""
    name = type(model).__name__
    if name == "FullyShardedDataParallel":
        raise InvalidOption(
            "FullyShardedDataParallel joins parameters into flat ones, whose elements have no names; use "
            "torch.distributed.fsdp.fully_shard, which keeps them"
        )
    return model.process_group if name == "DistributedDataParallel" else None


__all__ = ["PATTERNS", "Slimmed", "Sparsifier"]
