"""``python -m benchmarks.baselines``: the methods with their settings."""

from benchmarks.baselines import BASELINES

if __name__ == "__main__":
    for name, method in BASELINES.items():
        what = " ".join(method.__doc__.split("\n\n")[0].split())
        settings = method.__doc__.partition("Args:")[2].strip()
        print(f"{name}: {what}\n    {method.settings()}\n    " + " ".join(settings.split()) + "\n")
