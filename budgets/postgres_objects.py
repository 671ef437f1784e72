"""The tables, triggers, functions and views of a ledger in Postgres, and what its migrations make.

The migrations run in a second schema and are rolled back, so that one server describes both in its words.
Leaves out the migrations: see `schema_postgres`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from viaticum.budgets import schema_postgres as schema
from viaticum.budgets.store import Objects

if TYPE_CHECKING:
    import psycopg

_REFERENCE = "viaticum_reference"
# Types, defaults and collations of columns; whether a table is logged, and hides rows. Triggers: whether they
# are on, those of foreign keys too. Functions: their text. Indexes: whether they are complete.
_OBJECTS = """
SELECT 'table' AS kind, relname::text AS name, relpersistence::text || relrowsecurity::text || (
    SELECT string_agg(attname || ' ' || atttypid::regtype::text || attnotnull::text
      || attcollation::regcollation::text || coalesce(pg_get_expr(adbin, adrelid), ''), ', ' ORDER BY attnum)
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS definition
  FROM pg_class c WHERE relkind = 'r' AND relnamespace = {schema}::regnamespace
UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(t.oid) || tgenabled::text
  FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
  WHERE NOT tgisinternal AND relnamespace = {schema}::regnamespace
UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(k.oid) || convalidated::text
    || coalesce((SELECT string_agg(tgenabled::text, '' ORDER BY t.tgtype, t.tgfoid)
      FROM pg_trigger t WHERE tgconstraint = k.oid), '')
  FROM pg_constraint k WHERE contype IN ('c', 'f', 'p', 'u') AND connamespace = {schema}::regnamespace
UNION ALL SELECT 'index', c.relname, pg_get_indexdef(indexrelid) || indisvalid::text || indisready::text
  FROM pg_index JOIN pg_class c ON c.oid = indexrelid WHERE relnamespace = {schema}::regnamespace
UNION ALL SELECT 'function', proname,
    prosrc || pg_get_function_arguments(oid) || prosecdef::text || coalesce(proconfig::text, '')
  FROM pg_proc WHERE pronamespace = {schema}::regnamespace
UNION ALL SELECT 'view', relname, pg_get_viewdef(oid)
  FROM pg_class WHERE relkind = 'v' AND relnamespace = {schema}::regnamespace
UNION ALL SELECT 'rule', rulename, definition FROM pg_rules WHERE schemaname = {schema}
"""
_MADE = re.compile(r"CREATE (?:UNIQUE )?(TABLE|INDEX|FUNCTION|TRIGGER|VIEW) (\w+)")


def objects(connection: psycopg.Connection[dict[str, Any]]) -> tuple[Objects, Objects]:
    """The definitions that the migrations make, and those that are there.

    Who may not make a schema, or reads a standby, compares names alone.
    """
    import psycopg

    try:
        with connection.transaction(force_rollback=True):
            connection.execute(f"CREATE SCHEMA {_REFERENCE}")
            connection.execute(f"SET LOCAL search_path TO {_REFERENCE}")
            for step in schema.MIGRATIONS:
                connection.execute(step.replace("viaticum.", f"{_REFERENCE}."))
            connection.execute("SET LOCAL search_path TO pg_catalog")
            return _read(connection, _REFERENCE), _read(connection, "viaticum")
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction):
        with connection.transaction():
            found = _read(connection, "viaticum")
        made = {(kind.lower(), name) for kind, name in _MADE.findall("".join(schema.MIGRATIONS))}
        return {each: found.get(each, "") for each in made}, found


def _read(connection: psycopg.Connection[dict[str, Any]], name: str) -> Objects:
    rows = connection.execute(_OBJECTS.replace("{schema}", f"'{name}'")).fetchall()
    return {
        (row["kind"], row["name"].replace(f"{name}.", "")): row["definition"].replace(f"{name}.", "")
        for row in rows
    }
