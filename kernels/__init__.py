"""The Triton kernels, one file per operation; installed and imported as ``atm_triton.kernels``.

They know tensors and integers, never a model; ``atm_triton.ops`` makes torch operations of them.

If a checkout is on the path, Python also finds this folder as ``kernels``, a name that other libraries try to import.
It then gives way to an installed distribution of that name. Without one it is an empty module of version 0, which those
libraries treat as missing.
"""


def _give_way() -> None:
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).resolve().parents[1]
    places = [place for place, entry in enumerate(sys.path) if Path(entry).resolve() == here]
    # search only the later entries: from the start, this folder would be found again
    spec = PathFinder.find_spec("kernels", sys.path[places[-1] + 1 :] if places else [])
    if spec is not None and spec.loader is not None and spec.has_location:
        sys.modules["kernels"] = module = module_from_spec(spec)  # the import returns this module
        spec.loader.exec_module(module)


if __name__ == "kernels":
    __version__, __path__ = "0", []

    def __getattr__(name: str) -> None:
        raise AttributeError(f"kernels has no {name!r}: these are the kernels of atm-triton: import atm_triton.kernels")

    _give_way()
