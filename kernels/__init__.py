"""The Triton kernels, one file an operation; installed and imported as ``atm_triton.kernels``.

They know tensors and integers, never a model; ``atm_triton.library`` makes torch operations of them.
"""

if __name__ == "kernels":  # found by name because a checkout is the working directory
    raise ImportError(
        "these are the kernels of atm-triton: import atm_triton.kernels; for another distribution named "
        "kernels, start Python elsewhere or with -P"
    )
