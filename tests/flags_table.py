"""The table of all flags in docs/reference.md, made from the flags' own table.

    python -m tests.flags_table     writes it anew, after a change of utils/cli/options.py

The Chinese page has the same flags and defaults; its descriptions are written by hand.
"""

from pathlib import Path

from utils.cli.options import TABLE, Flag

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
BEGIN, END = "<!-- The table of tests/flags_table.py begins -->\n", "<!-- The table of tests/flags_table.py ends -->\n"


def cells(flag: Flag) -> tuple[str, str, str]:
    """Return the name, the default and the effect of a flag, as Markdown."""
    shown = "off" if flag.type is bool else f"`{flag.default}`"
    default = "" if flag.default in (None, "", []) else shown
    choices = f". One of {', '.join(f'`{choice}`' for choice in flag.choices)}" if flag.choices else ""
    return f"`--{flag.name}`", default, (flag.help + choices).replace("|", "\\|")


def sentence(words: str) -> str:
    """Return words as a sentence."""
    return f"{words[0].upper()}{words[1:]}."


def flags_table() -> str:
    """Return the tables of all groups of flags, as Markdown."""
    parts = []
    for title, (description, flags) in TABLE.items():
        parts.append(f"### {sentence(title)[:-1]}\n" + (f"\n{sentence(description)}\n" if description else ""))
        rows = ["| flag | default | effect |", "|---|---|---|"]
        rows += ["| " + " | ".join(cells(flag)) + " |" for flag in flags]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def split_page(text: str) -> tuple[str, str, str]:
    """Split a page into what comes before the table, the table, and what follows it."""
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before, table, after


if __name__ == "__main__":
    before, _, after = split_page(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{BEGIN}\n{flags_table()}\n{END}{after}", encoding="utf-8", newline="\n")
