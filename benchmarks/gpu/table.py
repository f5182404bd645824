"""The measurements as Markdown, with a table for each section that exists."""

from typing import Any

Sections = dict[str, dict[str, Any]]


def tables(sections: Sections) -> str:
    parts = []
    for name, section in sections.items():
        lines = [f"## {name}", ""]
        if "failed" in section:
            lines += [f"FAILED: {section['failed']}", ""]
        try:
            lines += MAKERS[name](section) if name in MAKERS else []
        except KeyError as error:  # the stage stopped before it measured this
            lines.append(f"(no {error.args[0]})")
        lines += [f"left out: {text}" for text in section.get("left_out", [])]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts)


def figure(value: Any, digits: int = 1) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: "-"}[value]
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def parity(section: dict[str, Any]) -> list[str]:
    rows = [
        [row["case"], *(f"{name} {share:.2g}" for name, share in row["of_tolerance"].items())]
        for row in section["rows"]
    ]
    lines = ["every image's bits are those that it has alone; share of the tolerance that each operation uses", ""]
    return lines + ["- " + ": ".join([row[0], ", ".join(row[1:])]) for row in rows] + section.get("tests", [])


def repeat(section: dict[str, Any]) -> list[str]:
    return [
        f"{row['runs']} runs alike: B={row['B']} N={row['N']} H={row['H']} {row['dtype']}" for row in section["rows"]
    ]


def engine(section: dict[str, Any]) -> list[str]:
    head = ["model", "batch", "variant", "ms", "quartiles", "images/s", "x timm", "x timm's graph", "bound/ours"]
    head += ["ours/one graph", "merged", "graphs", "MiB"]
    ratios = ("of_timm", "of_timm_graph", "of_bound", "whole")
    rows = [
        [row["model"], str(row["batch"]), row["name"], figure(row["milliseconds"], 3)]
        + [" to ".join(figure(quartile, 3) for quartile in row["quartiles"]), figure(row["images_per_second"], 0)]
        + [figure(row.get(key), 3) for key in ratios]
        + [figure(row.get("merged")), figure(row.get("graphs")), figure(row.get("mib"), 0)]
        for row in section["rows"]
    ]
    told = [
        "merging alone: bound/ours, the bound being in one graph; the engine alone: x timm's graph, where r = 0",
        f"logits at most {max((row['error'] for row in section['rows']), default=0):.1e} from those without graphs",
    ]
    return [*told, "", *grid(head, rows), *(f"WRONG: {line}" for line in section["wrong"])]


def sanitize(section: dict[str, Any]) -> list[str]:
    return [f"{tool}: {said}" for tool, said in section["tools"].items()]


def kernels(section: dict[str, Any]) -> list[str]:
    head = ["operation", "dtype", "B", "N", "H", "us", "GB/s", "of copy", "reference us"]
    rows = [
        [
            row["operation"],
            row["dtype"],
            *map(str, (row["B"], row["N"], row["H"])),
            figure(row["microseconds"]),
            figure(row["gb_per_second"], 0),
            figure(row["of_copy"], 2),
            figure(row["reference_eager"]),
        ]
        for row in section["rows"]
    ]
    after = figure(section.get("copy_gb_per_second_after"), 0)
    return [
        f"copy: {section['copy_gb_per_second']:.0f} GB/s, and {after} after it all; "
        f"an empty kernel: {figure(section['empty_us'])} us",
        "",
        *grid(head, rows),
    ]


def attention(section: dict[str, Any]) -> list[str]:
    head = ["dtype", "d", "N", "B", "H", "candidate", "us", "error", "table's", "fastest"]
    rows = []
    for row in section["rows"]:
        shape = [row["dtype"], *(str(row[key]) for key in ("d", "N", "B", "H")), row["candidate"]]
        error = f"{row['error']:.2e}" if "error" in row else row["failed"][:60]
        judged = ["yes" if row.get("taken") else "", figure(row["fastest"]) if row.get("taken") else ""]
        rows.append([*shape, figure(row["microseconds"]), error, *judged])
    return grid(head, rows)


def host(section: dict[str, Any]) -> list[str]:
    rows = [
        [row["operation"], figure(row["ops_microseconds"]), figure(row["torch_ops_microseconds"])]
        for row in section["rows"]
    ]
    lines = grid(["host us of a call", "atm_triton.ops", "torch.ops"], rows)
    launches = section.get("launches", {}).items()
    return lines + [f"{name} block: {row['all']} launches, {row['ours']} of them ours" for name, row in launches]


def training(section: dict[str, Any]) -> list[str]:
    rows = [
        [row["model"], row["dtype"], row["name"], figure(row["milliseconds"], 2), figure(row["peak_mib"], 0)]
        for row in section["rows"]
    ]
    return grid(["a step of", "dtype", "by", "ms", "peak MiB"], rows)


def trace(section: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {part['reads']} counts read, longest gap {figure(part['longest_gap_microseconds'])} us, "
        f"pass {part['pass_microseconds']:.0f} us, busy {figure(part['busy'], 3)}"
        for name, part in section.items()
        if isinstance(part, dict)
    ]


def memory(section: dict[str, Any]) -> list[str]:
    return [f"match N={row['N']}: {row['bytes']} bytes" for row in section["rows"]]


def targets(section: dict[str, Any]) -> list[str]:
    rows = [
        [row["target"], figure(row["value"], 3), f"{row['compare']} {row['wanted']}", figure(row["met"])]
        for row in section["rows"]
    ]
    return grid(["target", "value", "wanted", "met"], rows)


MAKERS = {
    "parity": parity,
    "repeat": repeat,
    "kernels": kernels,
    "attention": attention,
    "engine": engine,
    "training": training,
    "host": host,
    "trace": trace,
    "memory": memory,
    "sanitize": sanitize,
    "targets": targets,
}
