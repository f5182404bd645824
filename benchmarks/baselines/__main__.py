"""``python -m benchmarks.baselines``: the methods with their settings."""

from benchmarks.baselines import BASELINES

if __name__ == "__main__":
    for name, method in BASELINES.items():
        print(f"{name:10} {method.settings()}\n{'':10} {method.__doc__.splitlines()[0]}\n")
