"""Makes the demo's data: three small tasks, each with training and held-out examples that share no case.

    python demo/make_data.py            rewrites demo/data/*.jsonl, the same bytes every time

    sql       an English request -> an SQL query                      chat messages
    tickets   a support ticket -> the team and the priority, as JSON   chat messages
    dates     a date in words -> the ISO date                         prompt/completion

What is held out is decided before anything is phrased: an SQL query, a wording of a complaint or a calendar day that
stands in a held-out file appears in no form in the training file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
NUM_HELD_OUT = 100
MAX_TRAIN = 1600

Record = dict[str, Any]

# table -> (column that names a row, number columns with values, text columns with values)
SCHEMA: dict[str, tuple[str, dict[str, list[int]], dict[str, list[str]]]] = {
    "employees": (
        "name",
        {"age": [25, 30, 35, 40, 50, 60], "salary": [20000, 30000, 45000, 50000, 60000, 80000]},
        {
            "city": ["Paris", "London", "Rome", "Berlin", "Oslo"],
            "department": ["sales", "support", "finance", "research"],
        },
    ),
    "products": (
        "name",
        {"price": [5, 10, 20, 50, 75, 100], "stock": [3, 10, 25, 40, 80, 200]},
        {"brand": ["Acme", "Nova", "Zenith", "Orion"], "color": ["red", "blue", "green", "black", "white"]},
    ),
    "books": (
        "title",
        {"pages": [100, 150, 200, 300, 400, 500], "year": [1950, 1980, 1990, 2000, 2010, 2020]},
        {"genre": ["poetry", "history", "science", "fantasy"], "language": ["French", "German", "English", "Spanish"]},
    ),
    "orders": (
        "id",
        {"amount": [15, 50, 100, 250, 500, 1000], "quantity": [1, 2, 5, 10, 20, 100]},
        {
            "status": ["open", "paid", "shipped", "cancelled"],
            "country": ["Spain", "Japan", "Canada", "Brazil", "Kenya"],
        },
    ),
}
ABOVE = ["above", "over", "greater than", "more than"]
BELOW = ["below", "under", "less than", "smaller than"]

COMPLAINTS: dict[str, tuple[list[str], list[str]]] = {  # team -> (training wordings, held-out wordings)
    "billing": (
        [
            "I was charged twice for {item}",
            "the invoice for {item} has the wrong amount",
            "I want my money back for {item}",
            "my credit card was declined when I paid for {item}",
            "I need a receipt for {item}",
            "the discount on {item} was not applied to the bill",
            "my payment for {item} is still pending",
            "the price of {item} on my bill is too high",
        ],
        ["you billed me two times for {item}", "please refund the payment for {item}"],
    ),
    "shipping": (
        [
            "{item} has not arrived yet",
            "the parcel with {item} was damaged on the way",
            "{item} was sent to the wrong address",
            "the tracking number for {item} does not work",
            "the courier never delivered {item}",
            "when will {item} be delivered",
            "the package with {item} is lost",
            "delivery of {item} is a week late",
        ],
        ["the box with {item} never came", "where is the delivery of {item}"],
    ),
    "technical": (
        [
            "{item} does not turn on",
            "the screen of {item} shows an error",
            "{item} stops working after an update",
            "{item} crashes every few minutes",
            "I cannot connect {item} to the network",
            "the software of {item} is very slow",
            "{item} freezes when I start it",
            "the battery of {item} is empty after an hour",
        ],
        ["{item} shuts down with an error", "{item} will not start after the update"],
    ),
    "account": (
        [
            "I forgot my password for the page of {item}",
            "I cannot log in to register {item}",
            "please delete my account, I no longer use {item}",
            "I want to change the email address I registered {item} with",
            "my login was locked when I registered {item}",
            "please change my user name, I registered {item} with the old one",
            "somebody else uses my profile for {item}",
            "the reset link for my password for {item} has expired",
        ],
        ["I cannot sign in with my password to register {item}", "please close my account for {item}"],
    ),
}
ITEMS = ["the laptop", "the printer", "my phone", "the camera", "the router", "my watch", "the speaker", "the tablet"]
URGENCY = {
    "high": ["This is urgent.", "I need help today!", "Please answer at once!", "It is an emergency."],
    "normal": ["Please help.", "Can you look into it?", "Thank you for your help.", "I hope to hear from you."],
    "low": ["There is no hurry.", "Take your time.", "It can wait until next month.", "It is not important."],
}

MONTHS = [
    *["January", "February", "March", "April", "May", "June"],
    *["July", "August", "September", "October", "November", "December"],
]
ORDINALS = [
    *["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"],
    *["twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth"],
    *["twentieth", "twenty-first", "twenty-second", "twenty-third", "twenty-fourth", "twenty-fifth", "twenty-sixth"],
    *["twenty-seventh", "twenty-eighth"],
]


def chat(question: str, answer: str) -> Record:
    """A record with one question and one answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sql_cases() -> dict[str, list[tuple[str, list[str]]]]:
    """Every query of the task with the ways to ask for it, by kind."""
    kinds: dict[str, list[tuple[str, list[str]]]] = {}

    def add(kind: str, query: str, questions: list[str]) -> None:
        kinds.setdefault(kind, []).append((query, questions))

    for table, (name, numbers, texts) in SCHEMA.items():
        for number, values in numbers.items():
            add("max", f"SELECT MAX({number}) FROM {table};", [f"What is the highest {number} of all {table}?"])
            for count in (2, 3, 5, 7, 10, 20):
                add(
                    "top",
                    f"SELECT {name} FROM {table} ORDER BY {number} DESC LIMIT {count};",
                    [f"List the {count} {table} with the highest {number}.", f"Top {count} {table} by {number}"],
                )
            for value in values:
                for sign, words in ((">", ABOVE), ("<", BELOW)):
                    add(
                        "filter",
                        f"SELECT {name} FROM {table} WHERE {number} {sign} {value};",
                        [f"Which {table} have {number} {word} {value}?" for word in words]
                        + [f"Show the {name} of {table} with {number} {word} {value}." for word in words],
                    )
                    for text, option in _options(texts):
                        add(
                            "two filters",
                            f"SELECT {name} FROM {table} WHERE {text} = '{option}' AND {number} {sign} {value};",
                            [f"Which {table} have {text} {option} and {number} {word} {value}?" for word in words],
                        )
        for text, option in _options(texts):
            add(
                "count",
                f"SELECT COUNT(*) FROM {table} WHERE {text} = '{option}';",
                [f"How many {table} have {text} {option}?", f"Count the {table} with {text} {option}."],
            )
            for number in numbers:
                add(
                    "average",
                    f"SELECT AVG({number}) FROM {table} WHERE {text} = '{option}';",
                    [
                        f"What is the average {number} of {table} with {text} {option}?",
                        f"Average {number} of {table} whose {text} is {option}",
                    ],
                )
    return kinds


def _options(texts: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(text, option) for text, options in texts.items() for option in options]


def make_sql(rng: random.Random) -> tuple[list[Record], list[Record]]:
    """Held out: queries, a quarter of each kind. Training sees up to four phrasings of each of its own."""
    train, held_out = [], []
    for cases in sql_cases().values():
        some = rng.sample(cases, min(160, len(cases)))
        border = len(some) // 4
        held_out += [chat(rng.choice(questions), query) for query, questions in some[:border]]
        train += [
            chat(question, query)
            for query, questions in some[border:]
            for question in rng.sample(questions, min(4, len(questions)))
        ]
    return rng.sample(train, len(train)), rng.sample(held_out, NUM_HELD_OUT)


def make_tickets(rng: random.Random) -> tuple[list[Record], list[Record]]:
    """Held out: wordings of the complaint."""

    def tickets(wordings: Callable[[str], Sequence[str]]) -> list[Record]:
        return [
            chat(
                f"Ticket: {wording.format(item=item)[0].upper()}{wording.format(item=item)[1:]}. {closing}",
                json.dumps({"team": team, "priority": priority}),
            )
            for team in COMPLAINTS
            for wording in wordings(team)
            for item in ITEMS
            for priority, closings in URGENCY.items()
            for closing in closings
        ]

    train = tickets(lambda team: COMPLAINTS[team][0])
    held_out = tickets(lambda team: COMPLAINTS[team][1])
    return rng.sample(train, len(train)), rng.sample(held_out, NUM_HELD_OUT)


def make_dates(rng: random.Random) -> tuple[list[Record], list[Record]]:
    """Held out: calendar days, each in every year."""
    days = [(month, day) for month in range(1, 13) for day in range(1, 29)]
    rng.shuffle(days)

    def record(month: int, day: int) -> Record:
        year, name, ordinal = rng.randint(1900, 2040), MONTHS[month - 1], ORDINALS[day - 1]
        wording = rng.choice(
            [
                f"the {ordinal} of {name} {year}",
                f"{name} {day}, {year}",
                f"{day} {name} {year}",
                f"{name} the {ordinal}, {year}",
            ]
        )
        return {"prompt": f"{wording} =", "completion": f" {year}-{month:02d}-{day:02d}"}

    held_out_days = len(days) // 6
    held_out = [record(*rng.choice(days[:held_out_days])) for _ in range(NUM_HELD_OUT)]
    train = [record(month, day) for month, day in days[held_out_days:] for _ in range(8)]
    rng.shuffle(train)
    return train, held_out


TASKS = {"sql": make_sql, "tickets": make_tickets, "dates": make_dates}


def main() -> None:
    """Writes the files of all tasks."""
    DATA.mkdir(exist_ok=True)
    for name, make in TASKS.items():
        train, held_out = make(random.Random(f"perft demo {name}"))
        for split, records in (("train", train[:MAX_TRAIN]), ("heldout", held_out)):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (DATA / f"{name}.{split}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{name}.{split}.jsonl: {len(records)} records, {len(lines):,} bytes")


if __name__ == "__main__":
    main()
