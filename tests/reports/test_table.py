"""A table and what writes it."""

from __future__ import annotations

import csv
import io

import pytest

from blockprune.measures.score import Score
from blockprune.reports.table import (
    Cell,
    Column,
    Table,
    brief,
    count,
    facts_table,
    latex,
    number,
    prefix_of,
    share_of,
    step_latency,
    to_csv,
    to_latex,
    to_markdown,
)

FID = Score("", "", "fid", 12.3456, 64, 0, 11.0, 13.5)
TABLE = Table(
    "Models",
    [Column("model", "code"), Column("fid ↓"), Column("params, M", "size", 1e6), Column("saved", "share"), Column("why", "note")],
    [
        [Cell("a|`b_"), Cell.of(FID), Cell(859_520_964), share_of(25, 100, "25"), Cell("<no>")],
        [Cell("teacher"), Cell(), Cell(1_000), share_of(0, 100), Cell()],
    ],
    "One note.",
)


def test_numbers_are_readable() -> None:
    texts = ["-", "0", "0.123", "8.00", "123", "12,346", "1.2e-4", "-0.500"]
    assert [number(x) for x in (None, 0.0, 0.1234, 8.0, 123.4, 12345.6, 0.000123, -0.5)] == texts
    assert [count(x) for x in (7, 859520964, 999999, 97038080, -2500)] == ["7", "860 M", "1.00 M", "97.0 M", "-2.50 k"]


def test_brief_numbers_fit_their_cells() -> None:
    texts = {0.0137: "0.014", 0.00167: "0.0017", 3.8e-4: "4e-4", 1.66: "1.7", 0.0: "0", 57.3: "57", 217.0: "217"}
    assert {value: brief(value) for value in texts} == texts


def test_values_read_as_their_kind_says() -> None:
    texts = {
        "text": ("x", "x"),
        "plain": (12345, "12,345"),
        "count": (12345, "12.3 k"),
        "share": (0.123, "12.3%"),
        "ratio": (0.5, "0.500"),
    }
    assert {kind: Column("", kind).text(Cell(value)) for kind, (value, _) in texts.items()} == {
        k: text for k, (_, text) in texts.items()
    }
    assert [Column("", kind).text(Cell()) for kind in ("score", "share", "text", "note")] == ["-", "-", "", ""]
    block, cell = Column("", "block"), Cell("down_blocks.1.resnets.0")
    assert (block.text(cell), block.beside(cell), block.line(cell)) == ("down 1 R0", cell.value, cell.value)
    assert Column("", "ratio").beside(Cell(0.5, (0.4, 0.6))) == "[0.400, 0.600]"
    assert prefix_of([5.0, 2e6]) == ("M", 1e6) and prefix_of([]) == ("", 1.0)


def test_a_failed_score_has_no_value() -> None:
    assert (
        Cell.of(None) == Cell.of(Score("", "", "fid", None, 64, 0)) == Cell.of(Score("", "", "fid", float("nan"), 64, 0)) == Cell()
    )


def test_a_step_of_the_teacher_is_1_with_its_milliseconds() -> None:
    assert step_latency(0.0123, None) == Cell(1.0, remark="12.3 ms")
    assert step_latency(None, 0.7, (0.6, 0.8)) == Cell(0.7, (0.6, 0.8))
    assert step_latency(None, None) == Cell()


def test_columns_in_which_nothing_is_known_are_left_out() -> None:
    table = Table.of_columns("", [(Column("a"), [Cell(), Cell(1)]), (Column("b"), [Cell(), Cell()])])
    assert [column.title for column in table.columns] == ["a"]
    assert table.rows == [(Cell(),), (Cell(1),)]


def test_markdown() -> None:
    assert to_markdown(TABLE).splitlines() == [
        "| model | fid ↓ | params, M | saved | why |",
        "| --- | --- | --- | --- | --- |",
        "| `a  b_` | 12.3 [11.0, 13.5] | 859.5 | 25.0% (25) | &lt;no&gt; |",
        "| `teacher` | - | 0.001000 | - |  |",
        "",
        "One note.",
    ]
    assert to_markdown(facts_table({"a_b": [1, "|"], "c": None})).splitlines()[2:] == [r"| a\_b | 1, \| |", "| c | - |"]


def test_latex_takes_everything_literally_and_leaves_notes_out() -> None:
    assert latex("a_b & 5% of $x$ #1 {y} ~ ^ \\z <t>") == (
        r"a\_b \& 5\% of \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z \textless{}t\textgreater{}"
    )
    assert to_latex(TABLE, "tab:x").splitlines() == [
        r"\begin{table}[t]",
        r"  \centering",
        r"  \caption{Models. One note.}",
        r"  \label{tab:x}",
        r"  \begin{tabular}{lrrr}",
        r"    \toprule",
        r"    model & fid $\downarrow$ & params, M & saved \\",
        r"    \midrule",
        r"    a\textbar{}`b\_ & 12.3 & 859.5 & 25.0\% \\",
        r"    teacher & - & 0.001000 & - \\",
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def test_csv_has_every_column_and_lists_in_one_cell() -> None:
    text = to_csv([{"a": 1}, {"a": None, "b": ["x", "y"]}])
    assert list(csv.reader(io.StringIO(text))) == [["a", "b"], ["1", ""], ["", "x y"]]
    assert to_csv([]) == ""


@pytest.mark.parametrize("best", [True, False])
def test_brackets_and_shading_are_explained_where_they_are(best: bool) -> None:
    table = Table("", [Column("fid ↓")], [[Cell(1.0, best=best)]])
    assert table.marks == ("Shaded: the best student." if best else "")
    assert TABLE.marks == "In brackets: 95 % intervals."
