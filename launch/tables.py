"""What the doctor has found, as text."""

import statistics

from configs.cli import table
from launch.diagnosis import Examination, NodeReport, all_links, gpu_kinds, link_name
from launch.links import Clock, Link
from launch.machine import MachineConfig

SHOWN = 10  # links; of more, the slowest


def examination_text(found: Examination, machine: MachineConfig) -> str:
    """A table of the nodes, their software, a table of the links."""
    parts = [_nodes(found), _software(found), _ports(found, machine), *_links(found, machine)]
    return "\n\n".join(part for part in parts if part)


def printable(text: str) -> str:
    """`text` without what would steer a terminal: other nodes have said parts of it."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _nodes(found: Examination) -> str:
    clocks = {clock.node: clock for one in found.ranks for clock in one.clocks}
    titles = ["node", "host", "address", "GPUs", "cores", "memory", "disk", "temp", "/dev/shm", "clock"]
    titles += [place.url for place in found.nodes[0].places] if found.nodes else []
    rows = [_node(one, clocks.get(one.node)) for one in found.nodes]
    empty = ["-"] * (len(titles) - 3)
    rows += [[node, "did not report", "", *empty] for node in found.lost]
    return "free GiB; clocks in seconds ahead of node 0's\n" + table([titles, *rows])


def _node(one: NodeReport, clock: Clock | None) -> list[str]:
    facts = one.facts
    kinds = [f"{n} x {name} ({driver})" for (name, driver), n in gpu_kinds(facts).items()]
    cells = [str(one.node), one.host, one.address or "none", ", ".join(kinds) or "none", str(facts.cores)]
    cells += [f"{facts.available_gib:.1f} of {facts.memory_gib:.1f}", f"{facts.disk_gib:.1f}", f"{facts.temp_gib:.1f}"]
    cells += [f"{facts.shm_gib:.1f}", f"{clock.ahead_s:+.4f} ± {clock.round_trip_s / 2:.4f}" if clock else "-"]
    return cells + ["no" if place.error else "not shared" if place.unread else "shared" for place in one.places]


def _software(found: Examination) -> str:
    """One line per set of versions, with the nodes that have it."""
    having: dict[str, list[str]] = {}
    for one in found.nodes:
        said = ", ".join(f"{name} {version}" for name, version in one.facts.versions.items())
        having.setdefault(said, []).append(str(one.node))
    return "\n".join(f"software of node {', '.join(nodes)}: {said}" for said, nodes in having.items())


def _ports(found: Examination, machine: MachineConfig) -> str:
    here = len(found.nodes)
    if machine.nodes == 1:
        return f"ports: {machine.port} is free"
    open_ways = here * (here - 1) - sum(len(one.unreached) for one in found.nodes)
    return (
        f"ports: {machine.port} of node 0 was free and reached by {here - 1} of {machine.nodes - 1} others; "
        f"ports chosen freely were reached in {open_ways} of {here * (here - 1)} directions"
    )


def _links(found: Examination, machine: MachineConfig) -> list[str]:
    parts = []
    for between, links in all_links(found, machine).items():
        if links:
            rates = [link.mb_per_s for link in links]
            spread = f"{min(rates):.0f} to {max(rates):.0f} MB/s, median {statistics.median(rates):.0f}"
            kind = "between nodes" if between else "within nodes"
            title = f"{len(links)} link{'s' if len(links) > 1 else ''} {kind} over {found.ranks[0].backend}: {spread}"
            shown = sorted(links, key=lambda link: link.mb_per_s)[:SHOWN]
            title += f"; the slowest {SHOWN}" if len(links) > SHOWN else ""
            rows = [_link(found, machine, link) for link in shown]
            parts.append(f"{title}\n{table([['link', 'MB/s there', 'back', 'latency ms'], *rows])}")
    for one in found.ranks:
        if one.all_reduce_mb_per_s is not None:
            parts.append(f"all {machine.ranks} ranks together (all-reduce, bus): {one.all_reduce_mb_per_s:.0f} MB/s")
    return parts


def _link(found: Examination, machine: MachineConfig, link: Link) -> list[str]:
    rates = [f"{link.there_mb_per_s:.0f}", f"{link.back_mb_per_s:.0f}"]
    return [link_name(found, machine, link), *rates, f"{link.latency_ms:.3f}"]
