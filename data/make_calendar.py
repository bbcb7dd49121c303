"""Write real facts as small sources: dates in eight languages, asked through a chat, and a target in one more.

Names and forms of dates are those of the Unicode CLDR, from the package `babel` (requirements-real.txt). Each language is
a source of `messages`; the target asks for the same in a language that no source has. Four sources are shuffled copies:
their answers belong to other questions. Whoever looks at the languages can tell which should help: Norwegian names the days
as Danish does, the months nearly as Danish and Swedish do, and writes `mandag 3. mars`.

Reads   nothing
Writes  <output_dir>/sources/<language>.jsonl, <output_dir>/target/norwegian.jsonl

    python data/make_calendar.py --output_dir data/calendar
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from src import config, console
from src.artifacts import atomic_write

SOURCES = {
    "danish": "da", "swedish": "sv", "german": "de", "dutch": "nl",
    "french": "fr", "spanish": "es", "italian": "it", "finnish": "fi",
}  # fmt: skip
SHUFFLED = ("danish", "swedish", "german", "dutch")
TARGET, TARGET_LOCALE = "norwegian", "nb"


def date_in(day: date, locale: str) -> str:
    """Weekday, day and month in CLDR's full form without the year: `mandag 3. mars`."""
    from babel import Locale
    from babel.dates import format_date

    full = Locale.parse(locale).date_formats["full"].pattern
    pattern = re.sub(r",?\s*('[^']*'\s*)?y\.?$", "", full)
    if "y" in re.sub(r"'[^']*'", "", pattern):
        raise ValueError(f"CLDR's full date of {locale} is {full!r}, expected one that ends with the year")
    return format_date(day, pattern, locale=locale)


def conversations(locale: str, days: Sequence[date]) -> list[list[dict[str, str]]]:
    """Days asked for in English and answered in a language."""
    rows = []
    for day in days:
        question = date_in(day, "en")
        # an empty system turn: the template of some models writes a long one where there is none
        turns = ("system", ""), ("user", question), ("assistant", date_in(day, locale))
        rows.append([{"role": role, "content": content} for role, content in turns])
    return rows


def messages(conversations: Iterable[Sequence[dict[str, str]]]) -> list[dict[str, Any]]:
    """Conversations as rows of a file."""
    return [{"messages": turns} for turns in conversations]


def shuffled(rows: Sequence[Sequence[Any]], seed: int) -> list[list[Any]]:
    """The same rows, each with the last part, its answer, of another: all answers move on by one along a random circle."""
    circle = random.Random(seed).sample(range(len(rows)), len(rows))
    answer_of = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [[*row[:-1], rows[answer_of[position]][-1]] for position, row in enumerate(rows)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_world(folder: Path, num_rows: int, num_target_rows: int, seed: int) -> None:
    """All sources and the target, whose days no source has.

    Raises:
        ValueError: a year has too few days.
    """
    if num_rows + num_target_rows > 366:
        raise ValueError(
            f"a source of {num_rows} and a target of {num_target_rows} rows need more days than a year has"
        )
    days = [date(2024, 1, 1) + timedelta(days=offset) for offset in range(366)]
    random.Random(seed).shuffle(days)
    of_target, others = days[:num_target_rows], days[num_target_rows:]
    for language, locale in SOURCES.items():
        rows = conversations(locale, random.Random(f"{seed} {language}").sample(others, num_rows))
        write_rows(folder / "sources" / f"{language}.jsonl", messages(rows))
        if language in SHUFFLED:
            write_rows(folder / "sources" / f"{language}_shuffled.jsonl", messages(shuffled(rows, seed)))
    write_rows(folder / "target" / f"{TARGET}.jsonl", messages(conversations(TARGET_LOCALE, of_target)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("world")
    group.add_argument(
        "--output_dir", default="data/calendar", metavar="FOLDER", help="where to (default: data/calendar)"
    )
    group.add_argument("--rows", type=config.COUNT, default=16, help="rows of each source (default: 16)")
    group.add_argument("--target_rows", type=config.COUNT, default=64, help="rows of the target (default: 64)")
    group.add_argument("--seed", type=int, default=0, help="which days (default: 0)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the world."""
    folder = Path(args.output_dir)
    write_world(folder, args.rows, args.target_rows, args.seed)
    print(
        f"Wrote {folder}: {len(SOURCES) + len(SHUFFLED)} sources of {args.rows} rows, and the target {TARGET} of "
        f"{args.target_rows}. Next: python scripts/choose_sources.py --data_files {folder}/sources --target_files "
        f"{folder}/target/{TARGET}.jsonl"
    )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
