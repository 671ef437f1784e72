"""The world of the agents' tasks: a harbour with boats, trips and notes, made from a seed.

`Harbour.make` draws it, `write` puts it into a folder: trips and boats in an SQLite file, captains, repairs
and fees in text files. Leaves out what is asked of it (`task_set`).
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

SEED = 7
NAMES = (
    *("Heron", "Plover", "Curlew", "Dunlin", "Egret", "Fulmar"),
    *("Gannet", "Kestrel", "Lapwing", "Osprey", "Petrel", "Tern"),
)
FIRST = (
    *("Ada", "Bruno", "Clara", "Diego", "Edith", "Farid", "Greta", "Hugo"),
    *("Irma", "Jonas", "Kira", "Liam", "Mina", "Nils", "Olga", "Pavel"),
)
LAST = (
    *("Brook", "Castle", "Dale", "Fenn", "Glover", "Hale", "Iverson", "Kent"),
    *("Lund", "Marsh", "North", "Oakes", "Pike", "Reed", "Stone", "Ward"),
)
MONTHS = ("January", "February", "March", "April", "May", "June")
KINDS = {"ferry": (60, 120), "tug": (6, 12), "yacht": (8, 24)}  # smallest and largest number of seats
PARTS = ("engine", "rudder", "radio", "hull", "anchor", "pump")
TRIPS = 120


@dataclass(frozen=True)
class Boat:
    """One boat, its crew and its one repair. cost: dollars."""

    name: str
    kind: str
    seats: int
    captain: str
    engineer: str
    part: str
    cost: int
    repaired: str


@dataclass(frozen=True)
class Trip:
    """One trip. price: dollars a passenger."""

    id: int
    boat: str
    month: str
    passengers: int
    price: int


@dataclass(frozen=True)
class Harbour:
    """Everything that the tools can find."""

    boats: tuple[Boat, ...]
    trips: tuple[Trip, ...]

    @classmethod
    def make(cls, seed: int = SEED) -> Harbour:
        """The harbour of a seed: each boat makes a trip at least, and no two people share a name."""
        rng = random.Random(seed)
        first, last = rng.sample(FIRST, len(FIRST)), rng.sample(LAST, len(LAST))
        people = [f"{a} {b}" for a, b in zip(first, last, strict=True)]
        people += [f"{a} {b}" for a, b in zip(first, last[1:] + last[:1], strict=True)]
        boats = []
        for number, name in enumerate(NAMES):
            kind = rng.choice(list(KINDS))
            captain, engineer = people[2 * number], people[2 * number + 1]
            repair = rng.choice(PARTS), rng.randrange(15, 95) * 10, rng.choice(MONTHS)
            boats.append(Boat(name, kind, rng.randint(*KINDS[kind]), captain, engineer, *repair))
        trips = []
        for number in range(1, TRIPS + 1):
            boat = boats[number - 1] if number <= len(boats) else rng.choice(boats)
            filled = rng.randint(2, boat.seats)
            trips.append(Trip(number, boat.name, rng.choice(MONTHS), filled, rng.randint(3, 19)))
        return cls(tuple(boats), tuple(trips))

    def trips_of(self, boat: str, month: str | None = None) -> list[Trip]:
        return [trip for trip in self.trips if trip.boat == boat and month in (None, trip.month)]

    def write(self, folder: Path) -> None:
        """Write `harbour.db` and the folder `files`; what was there before is replaced."""
        database = folder / "harbour.db"
        database.unlink(missing_ok=True)
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("CREATE TABLE boats (name TEXT, kind TEXT, seats INTEGER)")
            connection.execute(
                "CREATE TABLE trips (id INTEGER, boat TEXT, month TEXT, passengers INTEGER, price INTEGER)"
            )
            connection.executemany(
                "INSERT INTO boats VALUES (?, ?, ?)",
                [(each.name, each.kind, each.seats) for each in self.boats],
            )
            rows = [(each.id, each.boat, each.month, each.passengers, each.price) for each in self.trips]
            connection.executemany("INSERT INTO trips VALUES (?, ?, ?, ?, ?)", rows)
        for boat in self.boats:
            crew = (
                f"Captain of the {boat.name}: {boat.captain}\nEngineer of the {boat.name}: {boat.engineer}\n"
            )
            repair = f"Repair of the {boat.name} in {boat.repaired}, {boat.part}: {boat.cost} dollars\n"
            for kind, text in ("crew", crew), ("repairs", repair):
                file = folder / "files" / kind / f"{boat.name.lower()}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
