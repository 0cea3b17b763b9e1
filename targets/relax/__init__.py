"""2:4 products in somebody else's compiler: a pass over TVM's Relax modules.

    from sparsecc.targets.relax import Sparse24

    sparse = Sparse24(target)
    module = tvm.ir.transform.Sequential([sparse, relax.get_pipeline("zero")])(module)
    print(*sparse.choices, sep="\\n")

TVM is imported when the pass is made.  ``find`` and ``fuse`` read a module, ``llvm`` writes functions for
processors, ``on_cuda`` wraps the kernels of ``sparsecc.targets.cuda``, and ``rewrite`` joins them.
"""

from sparsecc.targets.relax.product import Choice
from sparsecc.targets.relax.rewrite import Sparse24

__all__ = ["Choice", "Sparse24"]
