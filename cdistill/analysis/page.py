"""The look of our HTML pages: everything inside, readable without network or scripts, and on a phone."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1b1f24;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 92ch; }
section { background: #fff; border: 1px solid #d8dee4; border-radius: 12px; padding: 22px 24px; margin: 18px 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 22px 30px;
  align-items: start; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 18px 0 0; }
.card { border: 1px solid #d8dee4; border-top: 5px solid; border-radius: 10px; padding: 12px 16px; background: #fff; }
.card b { display: block; font-size: 1.9rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card b small { font-size: 1rem; font-weight: 400; color: #57606a; }
.card span { color: #57606a; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th:first-child { text-transform: capitalize; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e6eaee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { color: #57606a; }
tr.family th { padding-top: 14px; border-bottom: 2px solid #afb8c1; }
tr.avg td { font-weight: 700; }
tr.avg td small { font-weight: 400; }
figure { margin: 0; }
figcaption, .note { color: #424a53; font-size: .9rem; margin-top: .5rem; max-width: 100ch; }
.facts td { text-align: left; white-space: normal; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0 10px; font-size: .92rem; }
.legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.example { border-top: 1px solid #e6eaee; padding: 18px 0 6px; }
.maps { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.maps svg { border-radius: 6px; }
.maps p { margin: 4px 0 0; font-size: .88rem; line-height: 1.35; }
.right { color: #116329; font-weight: 600; } .wrong { color: #b3161b; font-weight: 600; }
code { background: #eff2f5; border-radius: 4px; padding: 1px 5px; font-size: .9em; }
@media (max-width: 640px) {
  main { padding: 18px 10px 40px; } section { padding: 16px 14px; }
  .cards { grid-template-columns: 1fr 1fr; } .maps { grid-template-columns: 1fr 1fr; }
  h1 { font-size: 1.5rem; } .card b { font-size: 1.6rem; } .card b small { display: block; }
  th, td { padding: 4px 3px; font-size: .8rem; white-space: normal; } td small { display: block; }
}
"""

# For pages whose pictures follow the colours of the page (`cdistill.analysis.figures`).
DARK = """
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; }
  body { background: #0d1117; color: #e6edf3; }
  section, .card { background: #161b22; border-color: #30363d; }
  th, td { border-color: #30363d; }
  figcaption, .note, td small, .card span, .card b small { color: #9da7b1; }
  code { background: #2a313a; }
  .right { color: #5ecb85; } .wrong { color: #ff8f8f; }
}
@media print {
  :root { color-scheme: light; }
  body { background: #fff; color: #1b1f24; font-size: 11pt; }
  section, .card { background: #fff; border: 0; padding: 0; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  th, td { border-color: #afb8c1; } figcaption, .note, td small { color: #424a53; }
  .grid { grid-template-columns: 1fr 1fr; }
}
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page of HTML sections, with rules of its own beside the common ones."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>{body}</main></body></html>\n"
    )
