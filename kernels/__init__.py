"""The Triton kernels, one file an operation; installed and imported as ``atm_triton.kernels``.

They know tensors and integers, never a model; ``atm_triton.ops`` makes torch operations of them.

Where a checkout is on the path this folder is found as ``kernels`` too, a name that other libraries ask for. There it
gives way to a distribution of that name; without one it is an empty module of version 0, which they take for none.
"""


def _give_way() -> None:
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).resolve().parents[1]
    places = [place for place, entry in enumerate(sys.path) if Path(entry).resolve() == here]
    # only what comes later: what was found before this would be found again
    spec = PathFinder.find_spec("kernels", sys.path[places[-1] + 1 :] if places else [])
    if spec is not None and spec.loader is not None and spec.has_location:
        sys.modules["kernels"] = module = module_from_spec(spec)  # which is what the import then returns
        spec.loader.exec_module(module)


if __name__ == "kernels":
    __version__, __path__ = "0", []

    def __getattr__(name: str) -> None:
        raise AttributeError(f"kernels has no {name!r}: these are the kernels of atm-triton: import atm_triton.kernels")

    _give_way()
