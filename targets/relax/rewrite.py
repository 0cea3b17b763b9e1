"""``Sparse24``: a pass over Relax modules that computes products with 2:4 weights from packed constants.

    lv = R.matmul(x, R.permute_dims(w)); lv1 = R.add(lv, b); y = R.nn.relu(lv1)
    y = R.call_tir(sparse24_relu, (x, values, index, b), R.Tensor((n, out)))

It stands anywhere before ``LegalizeOps`` in somebody else's pipeline; weights have to be constants by then
(``relax.transform.BindParams``).  Products inside of branches, and of functions that another pass has set
apart (Primitive, Codegen), are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsecc.errors import TargetRefused
from sparsecc.targets.cuda.tvm_build import load_tvm
from sparsecc.targets.relax.backend import Backend
from sparsecc.targets.relax.find import find_products
from sparsecc.targets.relax.on_cuda import OnCuda, Options
from sparsecc.targets.relax.on_llvm import OnLlvm
from sparsecc.targets.relax.product import Choice, Product
from sparsecc.targets.relax.scope import Scope

KINDS = ("llvm", "cuda")


def Sparse24(
    target: Any = None, *, product: str | None = None, choose: str = "modelled", tokens: int = 512
) -> Any:
    """The pass, for ``tvm.ir.transform.Sequential`` or to be called with a module.

    ``target`` is a ``tvm.target.Target`` or what makes one; by default the current one, else ``llvm``.
    After a run its attribute ``choices`` lists every product with a constant weight, with what became of it
    and why.  The other options are for CUDA (``Options``).  Raises ``TargetUnavailable`` without TVM,
    ``InvalidOption``, ``TargetRefused`` for a target of another kind.
    """
    tvm = load_tvm()
    options = Options(product, choose, tokens)
    backend = None if target is None else _backend(tvm.target.Target(target), options)

    class Pass:
        def __init__(self) -> None:
            self.choices: list[Choice] = []

        def transform_module(self, module: Any, context: Any) -> Any:
            chosen = backend or _backend(tvm.target.Target.current(), options)
            rewritten, self.choices = rewrite(module, chosen)
            return rewritten

    Pass.__name__ = "sparsecc.Sparse24"
    return tvm.transform.module_pass(Pass, opt_level=0)()


def _backend(target: Any, options: Options) -> Backend:
    kind = "llvm" if target is None else str(target.kind.name)
    if kind == "llvm":
        return OnLlvm()
    if kind == "cuda":
        return OnCuda(target, options)
    raise TargetRefused(f"2:4 functions exist for targets of kind {' and '.join(KINDS)}; got {kind}")


def rewrite(module: Any, backend: Backend) -> tuple[Any, list[Choice]]:
    """The module (``tvm.IRModule``) with 2:4 products as calls, and a choice for every product."""
    relax = load_tvm().relax
    choices: list[Choice] = []
    planned: dict[Any, Mapping[Any, Product]] = {}
    for var, function in module.functions.items():
        if not isinstance(function, relax.Function) or _set_apart(function):
            continue
        found = list(find_products(function, var.name_hint))
        decided = [_choice(product, backend) for product in found]
        choices += decided
        sparse = {p.output: p for p, choice in zip(found, decided, strict=True) if choice.sparse}
        if sparse:
            planned[var] = sparse
    return (_rewritten(module, planned, backend) if planned else module), choices


def _set_apart(function: Any) -> bool:
    attrs = function.attrs or {}
    return "Primitive" in attrs or "Codegen" in attrs


def _choice(product: Product, backend: Backend) -> Choice:
    sparse, why = (False, product.refusal) if product.refusal else backend.choose(product)
    return Choice(product.where, product.out, product.k, product.dtype, sparse, why)


def _rewritten(module: Any, planned: Mapping[Any, Mapping[Any, Product]], backend: Backend) -> Any:
    relax = load_tvm().relax

    @relax.expr_functor.mutator
    class Rewriter(relax.PyExprMutator):  # type: ignore[name-defined, misc]
        def __init__(self, module: Any) -> None:
            super().__init__(module)
            self.scope = Scope(relax, self.builder_)
            self.products: Mapping[Any, Product] = {}

        def visit_var_binding_(self, binding: Any) -> None:
            product = self.products.get(binding.var)
            if product is None:
                super().visit_var_binding_(binding)
                return
            made = backend.call(product, self.visit_expr(product.x), self.scope)
            inner = (
                isinstance(binding.var, relax.DataflowVar) or not self.builder_.current_block_is_dataflow()
            )
            emit = self.builder_.emit if inner else self.builder_.emit_output
            self.set_var_remap(binding.var, emit(made, binding.var.name))

    rewriter = Rewriter(module)
    for var, products in planned.items():
        rewriter.products = products
        function = rewriter.visit_expr(module[var])
        rewriter.builder_.update_func(var, relax.analysis.remove_all_unused(function))
    return rewriter.builder_.get()
