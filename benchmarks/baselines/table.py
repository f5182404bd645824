"""The methods side by side, in Markdown: what their classes say of them, and ATM."""

from collections.abc import Mapping

from benchmarks.baselines.base import About, Baseline

ATM = About(
    title="**ATM** (ECAI 2025)", licence="no code found", training="no, thresholds", own_count='with adapt="image"'
)
LEFT_OUT = {  # too little is known of what they compute
    "MaMe (CVPR 2026 Findings)": "whose repository (MIT) held no code when it was read: how its matrices are built, "
    "and how one threshold gives all images of a batch the same shape, was not found",
}
HEAD = (
    "method",
    "name",
    "licence of the authors' code",
    "needs training",
    "own count per image",
    "fused attention",
    "file",
)


def table(methods: Mapping[str, type[Baseline]]) -> str:
    """A row for ATM and for each method by name, then a sentence on each method that is left out."""
    body = [(ATM, "`atm_triton`", "atm_triton/block.py")]
    for name, method in methods.items():
        body.append((method.about, f"`{name}`", f"{method.__module__.replace('.', '/')}.py"))
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for about, name, file in body:
        cells = (about.title, name, about.licence, about.training, about.own_count, about.fused, f"`{file}`")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"Left out is {title}, {why}." for title, why in LEFT_OUT.items())]
    return "\n".join(lines)
