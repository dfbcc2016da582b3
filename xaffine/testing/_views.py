"""A report as HTML, as Markdown, and as the XML of JUnit."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from xaffine.testing.report import Report

__all__ = ["to_html", "to_junit", "to_markdown", "to_page"]

HEADER = ("property", "tier", "verdict", "cases", "error")
FOOTNOTE = "error: the worst, as a fraction of its rounding bound."
_COLOURS = {"holds": "#1a7f37", "lacking": "#9a6700"}
_STYLE = """\
.xaffine {font: 14px/1.5 system-ui, sans-serif; max-width: 60em; overflow-x: auto}
.xaffine table {border-collapse: collapse; width: 100%; font: inherit}
.xaffine th, .xaffine td {text-align: left; padding: .2em .6em; border-bottom: 1px solid #8884}
.xaffine td:nth-child(n+4), .xaffine th:nth-child(n+4) {text-align: right}
.xaffine meter {width: 5em} .xaffine pre {overflow-x: auto; padding: .6em; background: #8881}
.xaffine p, .xaffine li, .xaffine summary, .xaffine td:first-child {overflow-wrap: anywhere}
@media (max-width: 40em) {.xaffine td:nth-child(2), .xaffine th:nth-child(2), .xaffine meter {display: none}}"""


def to_html(report: Report) -> str:
    """A report as part of a page, which a notebook shows."""
    rows = []
    for result, (name, tier, word, cases, error) in zip(report.results, report.rows, strict=True):
        share = f'<meter max="1" value="{result.worst_error:.3g}"></meter> {error}' if result.worst_error else error
        title = f' title="{escape(result.part.prop.sentence)}"'
        verdict = f'<td style="color: {_COLOURS.get(word, "#cf222e")}">{word}</td>'
        name = name.replace("_", "_<wbr/>")
        rows.append(f"<tr{title}><td>{name}</td><td>{tier}</td>{verdict}<td>{cases}</td><td>{share}</td></tr>")
    failures = [
        f"<details><summary>{escape(group[0].cause)} ({', '.join(result.part.label for result in group)})</summary>"
        f"<pre>{escape(str(group[0].failure))}</pre></details>"
        for group in report.causes
    ]
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        f'<div class="xaffine"><style>{_STYLE}</style>'
        f"<p><strong>{report.verdict}</strong>: {escape(report.conclusion)}</p><p>{escape(report.head)}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<p><small>{FOOTNOTE}</small></p>{''.join(failures)}<ul>{notes}</ul></div>"
    )


def to_page(report: Report) -> str:
    """A report as a whole page."""
    head = '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
    title = f"<title>{escape(report.target)}: {report.verdict}</title>"
    return f"<!DOCTYPE html>\n<html><head>{head}{title}</head><body>{to_html(report)}</body></html>\n"


def to_markdown(report: Report) -> str:
    """A report as a summary for those who read it beside a change."""
    lines = [f"**{report.verdict}**: {report.conclusion}", "", report.head, ""]
    lines += [f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER), *report.rows)]
    lines += ["", FOOTNOTE, "", *(f"- {note}" for note in report.notes)]
    for group in report.causes:
        names = ", ".join(result.part.label for result in group)
        lines += ["", f"<details><summary>{names}</summary>", "", "```", str(group[0].failure), "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def to_junit(report: Report) -> str:
    """A report as the XML in which CI servers read what tests found."""
    suite = ET.Element("testsuite", name=f"xaffine check {report.target}", tests=str(len(report.results)))
    counts = dict.fromkeys(("failures", "errors", "skipped"), 0)
    for result in report.results:
        case = ET.SubElement(suite, "testcase", classname=f"xaffine.{result.part.prop.tier}", name=result.part.label)
        if result.verdict == "holds":
            continue
        counted = result in report.wrong
        kind = "failure" if counted else "skipped" if result.verdict == "FAILS" else "error"
        counts["skipped" if kind == "skipped" else f"{kind}s"] += 1
        told = result.cause or "no case could show a fault"
        ET.SubElement(case, kind, message=told).text = None if result.failure is None else str(result.failure)
    suite.attrib |= {name: str(count) for name, count in counts.items()}
    ET.SubElement(suite, "system-out").text = "\n".join([*report.notes, f"{report.verdict}: {report.conclusion}"])
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
