"""A table once, written as HTML (by the template), Markdown and CSV; hostile cells stay text.

May import the standard library.
"""

import csv
import dataclasses
import io
import re

# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[-−+<]?\s?[\d.,]+(?: %| ± [\d.]+| to [-−+]?[\d.]+|–\d+)?")
_SIGNED = re.compile(r"[-−+](?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~$!>])")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
      name: of its CSV file, and its anchor on the page.
      caption: says what stands there.
      columns: headings.
      rows: of strings, numbers and None, which is shown as a dash.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]

    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers, which align on the right."""
        return [
            all(isinstance(row[i], int | float | None) for row in self.rows)
            or all(_looks_numeric(row[i]) for row in self.rows)
            for i in range(len(self.columns))
        ]


def _looks_numeric(cell) -> bool:
    return cell is None or _NUMBER.fullmatch(cell_text(cell)) is not None


def cell_text(cell) -> str:
    """How a cell reads on the page and in Markdown."""
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell)


def to_markdown(table: Table) -> str:
    """A pipe table under its caption."""
    lines = [[markdown_text(name) for name in table.columns]]
    lines.append(["---:" if is_number else "---" for is_number in table.numeric()])
    lines += [[markdown_text(cell_text(cell)) for cell in row] for row in table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{markdown_text(table.caption)}\n\n{body}\n"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no HTML, no link, no cell of its own."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\1", text)


def to_csv(table: Table) -> str:
    """UTF-8 CSV by RFC 4180; numbers unrounded, None empty, formulas disarmed by an apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow([csv_cell(name) for name in table.columns])
    writer.writerows([csv_cell(cell) for cell in row] for row in table.rows)
    return file.getvalue()


def csv_cell(cell) -> str | int | float:
    """A cell that no spreadsheet runs. Source: OWASP, CSV Injection."""
    if cell is None:
        return ""
    if isinstance(cell, int | float):
        return cell
    text = str(cell).replace("\0", "")
    if _SIGNED.fullmatch(text):  # a number, as programs read it
        return text.replace("−", "-").removeprefix("+")
    return "'" + text if text.lstrip(" ").startswith(_FORMULA_STARTS) else text
