"""A report as one aligned page for the terminal, and as Markdown: the same sections, drawn twice."""

from __future__ import annotations

from typing import Any

Section = tuple[str, list[list[str]]]
"""A title and its rows; the first row names the columns."""

ESTIMATES = {
    "analytic": "model FLOPs at the chip's peak: nothing can be faster",
    "overlapped": "roofline of the compiled step, its slowest resource alone",
    "in turn": "roofline of the compiled step, one resource after the other",
    "compiler": "the compiler's cycles, kernels at the chip's peak, and the network in turn",
}
COLLECTIVES_SHOWN = 12


def sections(report: dict[str, Any]) -> list[Section]:
    """All that a reader needs to judge a step, program by program."""
    found: list[Section] = []
    for program, r in report["programs"].items():
        found.append((f"{program}: HBM of one chip", _memory_rows(r)))
        if "flops" not in r:
            continue
        if r["host"]["needed"]:
            host = r["host"]
            rows = [["group", "bytes", ""], ["tables", size(host["tables"]), ""]]
            rows.append(["of", size(host["available"]), "fits" if host["fits"] else "does NOT fit"])
            found.append((f"{program}: memory of one host", rows))
        found.append((f"{program}: time of a step (estimates: nothing was run)", _time_rows(r, program)))
        found.append((f"{program}: what one chip does in a step", _work_rows(r)))
        found.append((f"{program}: collectives, bytes that one chip sends in a step", _collective_rows(r)))
        if r["costliest"]:
            costs = [[f"{c['cycles_share']:.1%}", c["scope"][-100:]] for c in r["costliest"]]
            found.append((f"{program}: where the compiler's cycles are", [["share", "scope"], *costs]))
        if r["warnings"]:
            found.append((f"{program}: WARNINGS", [["what should not be"], *([line] for line in r["warnings"][:10])]))
        found.append((f"{program}: largest arrays made in HBM", _largest_rows(r)))
    return found


def _memory_rows(r: dict[str, Any]) -> list[list[str]]:
    memory = r["memory"]
    rows = [["group", "bytes", "share of the chip"]]
    for name, number in memory["groups"].items():
        rows.append([name, size(number), f"{number / memory['available']:.1%}"])
    verdict = "fits" if memory["fits"] else "does NOT fit"
    rows.append(["together, as allocated", size(memory["needed"]), f"{memory['needed'] / memory['available']:.1%}"])
    if "reported" in memory:
        rows.append(["(its memory analysis)", size(memory["reported"]), "idle gaps counted twice"])
    else:
        rows.append(["(no code generated)", "", "its size is not in it"])
    return [*rows, ["of", size(memory["available"]), f"{verdict}: the compiler's verdict"]]


def _time_rows(r: dict[str, Any], program: str) -> list[list[str]]:
    rows = [["estimate", "seconds", "MFU", "chip-hours of the run", "what it is"]]
    for name, e in r["times"]["estimates"].items():
        hours = f"{e['chip_hours']:,.0f}" if program == "train" else "-"
        mfu = "100%" if name == "analytic" else f"{e['mfu']:.1%}"
        rows.append([name, f"{e['seconds']:.4g}", mfu, hours, ESTIMATES[name]])
    return rows


def _work_rows(r: dict[str, Any]) -> list[list[str]]:
    seconds = r["times"]["resources"]
    flops = r["flops"]
    rows = [["what", "amount", "seconds"], ["model FLOPs (analytic)", f"{flops['model']:.4g}", ""]]
    ratio = flops["compiled"] / flops["model"] if flops["model"] else 0
    rows.append(
        [f"compiled FLOPs ({ratio:.2f} of the model's)", f"{flops['compiled']:.4g}", f"{seconds['compute']:.4g}"]
    )
    if flops["every_branch"] > 1.001 * flops["compiled"]:
        rows.append(["compiled FLOPs if every branch ran", f"{flops['every_branch']:.4g}", "(seldom)"])
    rows.append(["bytes through HBM", size(r["bytes"]["hbm"]), f"{seconds['hbm']:.4g}"])
    sent = sum(c["sent"] for c in r["collectives"])
    between = sum(c["sent_between_slices"] for c in r["collectives"])
    rows.append(["bytes sent within the slice", size(sent), f"{seconds['network']:.4g}"])
    if between:
        rows.append(["bytes sent between slices", size(between), "(in the above)"])
    if r["bytes"]["host_link"]:
        rows.append(["bytes between HBM and host", size(r["bytes"]["host_link"]), "not estimated"])
    for loop in r["long_loops"][:4]:
        what = f"{loop['loops']} loop{'s' if loop['loops'] > 1 else ''} of {loop['rounds']:,} rounds"
        rows.append([what, "one by one", loop["scope"][-60:]])
    if r["unknown_loops"]:
        rows.append([f"{r['unknown_loops']} loops of unknown length", "counted once", ""])
    if r["silent_kernels"]:
        rows.append([f"{len(r['silent_kernels'])} kernels that don't declare FLOPs", "counted as none", ""])
    return rows


def _collective_rows(r: dict[str, Any]) -> list[list[str]]:
    rows = [["collective", "over", "runs", "sent", "largest result", "array", "scope"]]
    lines = r["collectives"]
    for c in lines[:COLLECTIVES_SHOWN]:
        over = "+".join(c["axes"]) or f"groups of {c['group']}"
        total = c["sent"] + c["sent_between_slices"]
        rows.append(
            [
                c["kind"],
                over,
                f"{c['times']:g}",
                size(total),
                size(c["result_bytes"]),
                c["shape"][:40],
                c["scope"][-60:],
            ]
        )
    rest = lines[COLLECTIVES_SHOWN:]
    if rest:
        total = sum(c["sent"] + c["sent_between_slices"] for c in rest)
        rows.append([f"{len(rest)} more", "", "", size(total), size(max(c["result_bytes"] for c in rest)), "", ""])
    return rows


def _largest_rows(r: dict[str, Any]) -> list[list[str]]:
    return [["array", "bytes", "scope"]] + [[b["array"], size(b["bytes"]), b["scope"][-80:]] for b in r["largest"][:8]]


def page(report: dict[str, Any]) -> str:
    """For the terminal."""
    parts = [headline(report)]
    for title, rows in sections(report):
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts.append("\n".join([title, *("  " + line for line in drawn)]))
    return "\n\n".join([*parts, *_advice(report)])


def markdown(report: dict[str, Any]) -> str:
    parts = [f"# {report['name']} on {report['topology']['name']}", headline(report)]
    for title, rows in sections(report):
        parts.append(f"## {title}\n\n{table(rows)}")
    return "\n\n".join([*parts, *_advice(report)]) + "\n"


def table(rows: list[list[str]]) -> str:
    clean = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head, *body = clean
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in body)]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis}={n}" for axis, n in report["mesh"].items() if n > 1) or "one device"
    verdict = "fits" if report["fits"] else "does NOT fit"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"{report['name']} on {report['topology']['text']}, mesh {mesh}: {verdict}. ({versions})"


def _advice(report: dict[str, Any]) -> list[str]:
    return ["What to change:\n" + "\n".join(f"- {line}" for line in report["advice"])] if report.get("advice") else []


def size(number: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:.0f} B"
