"""``python -m benchmarks.baselines``: the methods with their settings, and side by side."""

from atm_triton.cli.bad_input import Parser
from benchmarks.baselines import ALL
from benchmarks.baselines.table import table

if __name__ == "__main__":
    Parser(prog="python -m benchmarks.baselines", description=__doc__.partition(": ")[2]).parse_args()
    for name, method in ALL.items():
        what = " ".join(method.__doc__.split("\n\n")[0].split())
        settings = method.__doc__.partition("Args:")[2].strip()
        print(f"{name}: {what}\n    {method.settings()}\n    " + " ".join(settings.split()) + "\n")
    print(table(ALL))
