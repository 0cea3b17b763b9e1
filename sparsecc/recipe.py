"""Recipes: ordered passes with a text form that round-trips.

>>> from sparsecc.passes import PASSES
>>> parse("ChannelPruning(sparsity=0.25); HeadPruning()", PASSES)[0].sparsity
0.25
>>> text(parse("ChannelPruning(sparsity=0.25); HeadPruning()", PASSES))
'ChannelPruning(sparsity=0.25); HeadPruning()'
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields

from sparsecc.errors import InvalidOption
from sparsecc.transform import Pass

Recipe = str | Pass | Iterable[Pass]


def parse(text: str, known: Mapping[str, type[Pass]]) -> list[Pass]:
    """Passes from text such as ``ChannelPruning(sparsity=0.5, exclude=('head',)); HeadPruning()``.

    Raises InvalidOption that says what is there instead; nothing in the text is executed.
    """
    found = [_one(part.strip(), known) for part in text.split(";") if part.strip()]
    if not found:
        raise InvalidOption(f"the recipe is empty; give passes, of which there are {', '.join(known)}")
    return found


def _one(text: str, known: Mapping[str, type[Pass]]) -> Pass:
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Name):
            tree = ast.Call(tree, [], [])
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
            raise ValueError("not of the form Pass(option=value, ...)")
        names = [str(k.arg) for k in tree.keywords]
        if len(set(names)) < len(names):
            raise ValueError("an option is given twice")
        options = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidOption(f"recipe step {text!r:.200}: {reason}; write Pass(option=value, ...)") from error
    name = tree.func.id
    if name not in known:
        raise InvalidOption(f"recipe step {text!r:.200}: there is no pass {name!r}{_hint(name, known)}")
    choices = [f.name for f in fields(known[name])]
    for option in options:
        if option not in choices:
            raise InvalidOption(
                f"recipe step {text!r:.200}: {name} has no option {option!r}{_hint(option, choices)}"
            )
    try:
        return known[name](**options)
    except TypeError as error:
        raise InvalidOption(f"recipe step {text!r:.200}: {error}") from error


def _hint(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return (f" (did you mean {near[0]!r}?)" if near else "") + f"; there are {', '.join(known)}"


def steps(recipe: Recipe, known: Mapping[str, type[Pass]]) -> list[Pass]:
    """A recipe in any form as a list of passes."""
    if isinstance(recipe, str):
        return parse(recipe, known)
    if isinstance(recipe, Pass):
        return [recipe]
    found = list(recipe)
    wrong = next((p for p in found if not isinstance(p, Pass)), None)
    if wrong is not None:
        raise InvalidOption(f"a recipe is made of passes, and {wrong!r} is none")
    return found


def text(recipe: Iterable[Pass]) -> str:
    """The text form."""
    return "; ".join(str(step) for step in recipe)
