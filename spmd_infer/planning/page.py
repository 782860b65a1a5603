"""A plan as one self-contained page: XHTML with SVG drawings, no script and nothing loaded from elsewhere.

Everything drawn is also there as text, for readers who cannot see it and for tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from spmd_infer.planning.drawing import Part, legend, mesh_picture, shares, weight_picture
from spmd_infer.planning.estimates import Candidate, StepTime, gigabytes
from spmd_infer.planning.explain import (
    layout_words,
    memory_parts,
    mesh_words,
    milliseconds,
    tensor_search_words,
    too_large,
)
from spmd_infer.planning.outcome import PlanOutcome
from spmd_infer.planning.weight_groups import weight_groups

_SHOWN_GROUPS = 9
_CUT = 4  # bars of plans that take longer than this many times the chosen one are cut off

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #c9d0d9; --paper: #ffffff; --box: #f4f6f8;
  --c0: #2f6fb3; --c1: #c8741c; --c2: #3c8d53; --c3: #8a5aa8; --c4: #d9dee5; --c5: #aab4c0; --on: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #3b4552; --paper: #14181e;
  --box: #1d232b; --c0: #5b9ae0; --c1: #e39a4a; --c2: #67b97f; --c3: #b58ad2; --c4: #2c343f; --c5: #4a5563;
  --on: #10141a; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, .soft { color: var(--soft); margin: .3rem 0; } b, strong { color: var(--ink); }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td.reason { min-width: 11rem; } td.bar { min-width: 150px; padding-top: .55rem; }
tr.chosen td { background: var(--box); font-weight: 600; }
code { font: .86rem ui-monospace, monospace; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.facts div { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; }
.facts span { display: block; color: var(--soft); font-size: .8rem; } .facts b { font-size: 1.15rem; }
.wide { overflow-x: auto; } .weights { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr));
  gap: .9rem; } .weights figure { margin: 0; padding: .7rem; background: var(--box); border: 1px solid var(--line);
  border-radius: 6px; } figcaption { font-size: .82rem; color: var(--soft); overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.s { fill: var(--soft); } svg text.o { fill: var(--on); } svg text.w { fill: var(--ink); }
.p0 { fill: var(--c0); } .p1 { fill: var(--c1); } .p2 { fill: var(--c2); } .p3 { fill: var(--c3); }
.p4 { fill: var(--c4); } .p5 { fill: var(--c5); } .b { fill: var(--box); stroke: var(--line); }
.e { stroke: var(--paper); stroke-width: 1; } .k { fill: none; stroke: var(--soft); stroke-width: 2; }
i.p0, i.p1, i.p2, i.p3, i.p4, i.p5 { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
i.p0 { background: var(--c0); } i.p1 { background: var(--c1); } i.p2 { background: var(--c2); }
i.p3 { background: var(--c3); } i.p4 { background: var(--c4); } i.p5 { background: var(--c5); }
.legend { font-size: .85rem; color: var(--soft); margin: .4rem 0; } .legend span { margin-right: 1.1rem; }
"""


def page(plan: PlanOutcome) -> str:
    """The page: an XHTML document as text."""
    title = f"{plan.model} on {plan.cluster}"
    sections = [
        _head(plan),
        _mesh(plan),
        _memory(plan),
        _times(plan),
        _weights(plan),
        _candidates(plan),
        _notes(plan),
    ]
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en">\n<head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Plan: {escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for section in sections for part in section)
        + "\n</body>\n</html>\n"
    )


def _head(plan: PlanOutcome) -> Iterator[str]:
    chosen = plan.chosen
    yield f"<h1>{escape(plan.model)} on {escape(str(plan.cluster))}</h1>"
    total = sum(layout.nbytes for layout in plan.weights)
    yield (
        f"<p>Traffic: {escape(plan.workload)}. Weights: {gigabytes(total)} in {len(plan.weights)} tensors. "
        f"The mesh was {'given by the caller' if plan.given else 'chosen by the planner'}.</p>"
    )
    facts = {"mesh": str(plan.mesh), "layout": chosen.layout or "-"}
    if chosen.pipeline is not None:
        facts["micro-batches"] = str(chosen.pipeline.microbatches)
        facts["bubble"] = f"{chosen.pipeline.bubble:.0%} of the time"
    facts |= {f"{phase.name}, a step": milliseconds(phase.time.total) for phase in chosen.phases}
    if chosen.time is not None:
        facts["in all"] = milliseconds(chosen.time.total)
    facts["memory of a device"] = f"{gigabytes(chosen.memory.total)} of {gigabytes(plan.cluster.device.memory_bytes)}"
    if chosen.most_rows:
        facts["room for"] = f"{chosen.most_rows:,} rows"
    cells = "".join(f"<div><span>{escape(k)}</span><b>{escape(v)}</b></div>" for k, v in facts.items())
    yield f'<div class="facts">{cells}</div>'


def _mesh(plan: PlanOutcome) -> Iterator[str]:
    cluster = plan.cluster
    device = cluster.device
    yield "<h2>The mesh over hosts and links</h2>"
    yield f'<div class="wide">{mesh_picture(plan.mesh.shape, cluster.per_host, cluster.domain)}</div>'
    links = f"{gigabytes(device.link)}/s and direction"
    joined = "link domain (the bracket above the hosts)" if cluster.domain > cluster.per_host else "host"
    network = f"{gigabytes(device.network)}/s a device"
    beyond = f"; between {joined.split(' (')[0]}s {network}" if plan.mesh.size > cluster.domain else ""
    yield (
        "<p>A square is a device, a frame a host; devices of one letter hold the same part along the mesh's last axis "
        "(colours repeat after four, and pointing at a square names its place). Devices of one "
        f"{joined} are joined by links of {links}{beyond}.</p>"
    )
    rows = []
    reach = 1
    for axis, size in reversed(list(plan.mesh.shape.items())):
        reach *= size
        where = "within a link domain" if reach <= cluster.domain else "across the network"
        rows.append((axis, str(size), where if size > 1 else "no communication"))
    yield _table(("mesh axis", "devices", "its collectives run"), reversed(rows))


def _memory(plan: PlanOutcome) -> Iterator[str]:
    size, used = plan.cluster.device.memory_bytes, plan.chosen.memory
    reserve = size - plan.available
    numbers = memory_parts(used) | {"free": max(0, size - reserve - used.total), "kept free": reserve}
    parts = [Part(name, number, index) for index, (name, number) in enumerate(numbers.items())]
    yield "<h2>Memory of a device</h2>"
    yield shares(parts, max(size, used.total), 22, "memory of a device", gigabytes)
    yield legend(parts, gigabytes)


def _times(plan: PlanOutcome) -> Iterator[str]:
    chosen = plan.chosen
    if chosen.time is None:
        return
    yield "<h2>Time of a step</h2>"
    steps: list[tuple[str, str, StepTime]] = [
        (phase.name + (f", {phase.times} of them" if phase.times > 1 else ""), phase.collectives, phase.time)
        for phase in chosen.phases
    ] or [("a step", chosen.collectives, chosen.time)]
    counts = (
        "Arithmetic and reading of memory overlap, so the longer of the two counts"
        if chosen.time.overlaps
        else "Simulated devices compute or read memory, so both count"
    )
    yield f"<p>{counts}; collectives come on top.</p>"
    for name, collectives, time in steps:
        parts = _time_parts(time)
        yield f"<p><strong>{escape(name)}: {milliseconds(time.total)}</strong>; collectives: {escape(collectives)}</p>"
        for part in parts:
            most = max(time.compute, time.memory, time.collectives)
            yield shares([part], most, 14, f"{name}: {part.name}", milliseconds, label=True)
    if chosen.switch:
        yield f"<p>Moving keys and values between the phases' layouts: {milliseconds(chosen.switch)}.</p>"


def _time_parts(time: StepTime) -> list[Part]:
    return [
        Part("compute", time.compute, 0),
        Part("memory (HBM)", time.memory, 1),
        Part("collectives", time.collectives, 2),
    ]


def _weights(plan: PlanOutcome) -> Iterator[str]:
    groups = weight_groups(plan.weights)
    yield "<h2>How the weights lie on it</h2>"
    yield "<p>By kind, those that take most memory of a device first. Each field is held by the devices it names.</p>"
    figures = []
    for group in groups[:_SHOWN_GROUPS]:
        copies = plan.mesh.size // group.parts
        held = "whole on every device" if group.parts == 1 else f"{group.parts} pieces, {copies} of each"
        why = f"; {escape(group.whole)}" if group.whole else ""
        figures.append(
            f"<figure>{weight_picture(group, plan.mesh)}<figcaption><strong><code>{escape(group.pattern)}</code>"
            f"</strong> × {group.count}<br/>{escape(group.words())}, {escape(str(group.dtype))}<br/>{held}{why}: "
            f"{gigabytes(group.device_bytes)} on a device</figcaption></figure>"
        )
    yield f'<div class="weights">{"".join(figures)}</div>'
    if plan.tensors is not None:
        said, *changes = tensor_search_words(plan.tensors)
        yield f"<p>{escape(said[:1].upper() + said[1:])}.</p>"
        yield f"<ul>{''.join(f'<li>{escape(change.strip())}</li>' for change in changes)}</ul>" if changes else ""
    rest = groups[_SHOWN_GROUPS:]
    if rest:
        size = gigabytes(sum(group.device_bytes for group in rest))
        yield f"<p>{len(rest)} smaller kinds take {size} on a device.</p>"


def _candidates(plan: PlanOutcome) -> Iterator[str]:
    yield "<h2>All plans that were looked at</h2>"
    timed = [c.time.total for c in plan.candidates if c.time is not None]
    longest = min(max(timed), _CUT * plan.chosen.time.total) if plan.chosen.time is not None else 0.0
    phases = [phase.name for phase in plan.chosen.phases]
    head = ("mesh", "layout", "memory", *(phases if len(phases) > 1 else ()), "in all", "", "why not")
    body = []
    for candidate in sorted(plan.candidates, key=too_large):
        by_name = {phase.name: milliseconds(phase.time.total) for phase in candidate.phases}
        cells = [
            f"<td><code>{escape(mesh_words(candidate.mesh.shape))}</code></td>",
            f"<td>{escape(layout_words(candidate))}</td>",
            f'<td class="n">{gigabytes(candidate.memory.total)}</td>',
            *(f'<td class="n">{by_name.get(name, "-")}</td>' for name in (phases if len(phases) > 1 else ())),
            f'<td class="n">{milliseconds(candidate.time.total) if candidate.time else "-"}</td>',
            f'<td class="bar">{_bar(candidate, longest)}</td>',
            f'<td class="reason">{escape(_verdict(plan, candidate))}</td>',
        ]
        row = '<tr class="chosen">' if candidate is plan.chosen else "<tr>"
        body.append(f"{row}{''.join(cells)}</tr>")
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    yield f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    if timed:
        named = [Part("compute beyond memory", 0, 0), Part("memory (HBM)", 0, 1), Part("collectives", 0, 2)]
        yield legend(named, None)
        yield f"<p>Bars share one scale; those beyond {_CUT} times the chosen plan are cut off.</p>"


def _bar(candidate: Candidate, longest: float) -> str:
    """A row's time, all bars to one scale; those longer than most are cut."""
    time = candidate.time
    if time is None or not longest:
        return ""
    beyond = max(0.0, time.total - time.memory - time.collectives)
    parts = [Part("memory", time.memory, 1), Part("compute", beyond, 0), Part("collectives", time.collectives, 2)]
    whole = sum(part.number for part in parts)
    scale = time.total / whole if whole else 1.0
    parts = [Part(part.name, part.number * scale, part.colour) for part in parts]
    return shares(parts, max(longest, 1e-12), 12, "time", milliseconds, width=150)


def _verdict(plan: PlanOutcome, candidate: Candidate) -> str:
    if candidate is plan.chosen:
        return "given" if plan.given else "chosen"
    return candidate.rejected


def _notes(plan: PlanOutcome) -> Iterator[str]:
    device = plan.cluster.device
    yield "<h2>What this rests on</h2>"
    for note in plan.notes:
        yield f"<p>Note: {escape(note)}.</p>"
    rates = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in device.flops.items() if rate)
    yield (
        f"<p>Figures of {escape(device.name)}: {escape(rates)} TFLOP/s (of which {device.matmul_efficiency:.0%} are "
        f"reached), memory {device.bandwidth / 1e12:.3g} TB/s ({device.bandwidth_efficiency:.0%}), links "
        f"{device.link / 1e9:.4g} GB/s ({device.link_efficiency:.0%}), network {device.network / 1e9:.4g} GB/s. "
        f"Source: {escape(device.source or 'not stated')}.</p>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
