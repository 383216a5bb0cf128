"""What each Triton op is checked on: one module per op, named as its folder in kernels.

`checks(device)` yields names and functions that compare the kernel with its reference in float64, on fresh random
inputs over odd sizes, strides and dtypes. They run in Triton's interpreter on a CPU, and compiled on a GPU; bfloat16
only on a GPU, because the interpreter computes it wrongly. `compilations()` lists what is compiled ahead of time.
"""

import pkgutil

OPS = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "compilation")
