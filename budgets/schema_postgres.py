"""Tables of the Postgres ledger, as numbered migrations, in a Postgres schema of their own named `viaticum`.

`MIGRATIONS[n]` takes the schema from version n to n + 1; the version is a row of viaticum.version. A released
migration is never edited: add another. Version numbers are independent of those of the SQLite file. Leaves
out connections and transactions: see `postgres`.
"""

from __future__ import annotations

from viaticum.budgets.store import GENESIS_HASH

_TABLES = f"""
CREATE TABLE budgets (
  name TEXT COLLATE "C" PRIMARY KEY,
  parent TEXT COLLATE "C" REFERENCES budgets (name),
  root TEXT COLLATE "C" NOT NULL,
  depth INTEGER NOT NULL CHECK (depth >= 0),
  limit_nanousd BIGINT CHECK (limit_nanousd > 0),
  limit_tokens BIGINT CHECK (limit_tokens > 0),
  time_window TEXT NOT NULL DEFAULT '',
  state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'paused', 'closed')),
  posted_nanousd BIGINT NOT NULL DEFAULT 0 CHECK (posted_nanousd >= 0),
  held_nanousd BIGINT NOT NULL DEFAULT 0 CHECK (held_nanousd >= 0),
  posted_tokens BIGINT NOT NULL DEFAULT 0 CHECK (posted_tokens >= 0),
  held_tokens BIGINT NOT NULL DEFAULT 0 CHECK (held_tokens >= 0),
  entries BIGINT NOT NULL DEFAULT 0,
  head TEXT NOT NULL DEFAULT '{GENESIS_HASH}',
  last_at TEXT NOT NULL DEFAULT '',
  CHECK (limit_nanousd IS NOT NULL OR limit_tokens IS NOT NULL OR parent IS NOT NULL)
) WITH (fillfactor = 50);

CREATE TABLE buckets (
  budget TEXT COLLATE "C" NOT NULL REFERENCES budgets (name),
  bucket BIGINT NOT NULL,
  nanousd BIGINT NOT NULL,
  tokens BIGINT NOT NULL,
  PRIMARY KEY (budget, bucket)
);

CREATE TABLE holds (
  key TEXT COLLATE "C" PRIMARY KEY,
  budget TEXT COLLATE "C" NOT NULL REFERENCES budgets (name),
  state TEXT NOT NULL
    CHECK (state IN ('reserved', 'dispatched', 'posted', 'void', 'expired', 'unknown')),
  held_nanousd BIGINT NOT NULL CHECK (held_nanousd >= 0),
  held_tokens BIGINT NOT NULL CHECK (held_tokens >= 0),
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  created TEXT COLLATE "C" NOT NULL,
  result TEXT,
  parameters TEXT NOT NULL,
  tags TEXT NOT NULL,
  lease BIGINT NOT NULL,
  until TEXT COLLATE "C" NOT NULL
);

CREATE TABLE entries (
  id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  budget TEXT COLLATE "C" NOT NULL REFERENCES budgets (name),
  key TEXT COLLATE "C" REFERENCES holds (key),
  kind TEXT NOT NULL CHECK (kind IN ('limit', 'pause', 'resume', 'close', 'reserve', 'dispatch', 'result',
    'post', 'void', 'expire', 'unknown')),
  nanousd BIGINT NOT NULL CHECK (nanousd >= 0),
  tokens BIGINT NOT NULL CHECK (tokens >= 0),
  overrun BIGINT NOT NULL CHECK (overrun >= 0),
  at TEXT COLLATE "C" NOT NULL,
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  note TEXT NOT NULL,
  root TEXT COLLATE "C" NOT NULL REFERENCES budgets (name),
  number BIGINT NOT NULL,
  hash TEXT NOT NULL,
  CHECK ((key IS NULL) = (kind IN ('limit', 'pause', 'resume', 'close')))
);

CREATE INDEX budgets_by_parent ON budgets (parent);
CREATE INDEX open_holds ON holds (budget, state, until) WHERE state IN ('reserved', 'dispatched', 'unknown');
CREATE UNIQUE INDEX one_place_in_the_chain ON entries (root, number);
CREATE UNIQUE INDEX one_reserve_a_key ON entries (key) WHERE kind = 'reserve';
CREATE UNIQUE INDEX one_end_a_key ON entries (key) WHERE kind IN ('post', 'void', 'expire');
"""

_GUARDS = """
CREATE FUNCTION kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '% of % is refused: the ledger is append-only', TG_OP, TG_TABLE_NAME; END $$;

CREATE FUNCTION ends_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (OLD.state IN ('posted', 'void', 'expired') AND NEW.state <> OLD.state)
    OR (OLD.state <> 'reserved' AND NEW.state IN ('reserved', 'expired') AND NEW.state <> OLD.state)
    OR (OLD.state = 'unknown' AND NEW.state = 'dispatched')
    OR (OLD.result IS NOT NULL AND NEW.result IS DISTINCT FROM OLD.result)
    OR (NEW.key, NEW.budget, NEW.held_nanousd, NEW.held_tokens, NEW.usage, NEW.prices, NEW.created,
        NEW.parameters, NEW.tags, NEW.lease)
      IS DISTINCT FROM (OLD.key, OLD.budget, OLD.held_nanousd, OLD.held_tokens, OLD.usage, OLD.prices,
        OLD.created, OLD.parameters, OLD.tags, OLD.lease)
  THEN RAISE EXCEPTION 'a hold ends once and keeps its terms'; END IF;
  RETURN NEW;
END $$;

CREATE TRIGGER entries_are_kept BEFORE UPDATE OR DELETE ON entries FOR EACH ROW EXECUTE FUNCTION kept();
CREATE TRIGGER entries_stay BEFORE TRUNCATE ON entries FOR EACH STATEMENT EXECUTE FUNCTION kept();
CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds FOR EACH ROW EXECUTE FUNCTION ends_once();
CREATE TRIGGER holds_are_kept BEFORE DELETE ON holds FOR EACH ROW EXECUTE FUNCTION kept();
CREATE TRIGGER holds_stay BEFORE TRUNCATE ON holds FOR EACH STATEMENT EXECUTE FUNCTION kept();
CREATE TRIGGER budgets_are_kept BEFORE DELETE ON budgets FOR EACH ROW EXECUTE FUNCTION kept();
CREATE TRIGGER budgets_stay BEFORE TRUNCATE ON budgets FOR EACH STATEMENT EXECUTE FUNCTION kept();
"""

_VIEWS = """
CREATE VIEW spend_by_scope AS
SELECT name, parent, state, time_window,
  limit_nanousd / 1e9 AS limit_usd, posted_nanousd / 1e9 AS posted_usd, held_nanousd / 1e9 AS held_usd,
  limit_tokens, posted_tokens, held_tokens
FROM budgets ORDER BY name;

CREATE VIEW spend_by_model AS
SELECT cost.key AS model, count(*) AS calls, sum(cost.value::bigint) / 1e9 AS usd,
  sum((e.usage::json -> cost.key ->> 'input_tokens')::bigint) AS input_tokens,
  sum((e.usage::json -> cost.key ->> 'output_tokens')::bigint) AS output_tokens
FROM entries e, json_each_text(e.note::json -> 'costs') cost
WHERE e.kind = 'post' GROUP BY cost.key ORDER BY cost.key;

CREATE VIEW spend_by_strategy AS
SELECT coalesce(note::json -> 'tags' ->> 'strategy', '') AS strategy, count(*) AS calls,
  sum(nanousd) / 1e9 AS usd, sum(tokens) AS tokens
FROM entries WHERE kind = 'post' GROUP BY 1 ORDER BY 1;

CREATE VIEW spend_by_day AS
SELECT substr(at, 1, 10) AS day, count(*) AS calls, sum(nanousd) / 1e9 AS usd, sum(tokens) AS tokens
FROM entries WHERE kind = 'post' GROUP BY 1 ORDER BY 1;
"""

_CLOCKS = """
ALTER TABLE entries DROP CONSTRAINT entries_kind_check, DROP CONSTRAINT entries_check,
  ADD CONSTRAINT entries_kind_check CHECK (kind IN ('limit', 'pause', 'resume', 'close', 'clock', 'reserve',
    'dispatch', 'result', 'post', 'void', 'expire', 'unknown')),
  ADD CONSTRAINT entries_check
    CHECK ((key IS NULL) = (kind IN ('limit', 'pause', 'resume', 'close', 'clock')));
"""

_LEASES = """
CREATE TABLE leases (
  name TEXT COLLATE "C" PRIMARY KEY,
  owner TEXT NOT NULL,
  until TEXT COLLATE "C" NOT NULL
);
"""

# What `postgres_calls` proposes, in one round trip. Each operation is applied if all that it rests on is
# still so and every limit holds; else nothing of it, its reply is null, and the rules decide in another
# transaction. Statements after the first lock see all that was committed before it.
_CALLS = """
CREATE FUNCTION apply_calls(operations jsonb, commits text) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
  op jsonb; part jsonb; replies jsonb := '[]'; ids jsonb; is_new boolean; fits boolean;
  root viaticum.budgets; scope viaticum.budgets; names text[]; began timestamptz; waited float8 := 0;
  moment text COLLATE "C"; place bigint; tip text; made bigint;
  held_n bigint; held_t bigint; posted_n bigint; posted_t bigint; spent_n numeric; spent_t numeric;
BEGIN
  IF commits <> 'on' THEN PERFORM set_config('synchronous_commit', commits, true); END IF;
  FOR op IN SELECT value FROM jsonb_array_elements(operations) LOOP
    fits := true; root := NULL; names := '{}'; began := clock_timestamp(); is_new := op->>'expected' IS NULL;
    held_n := (op->'held'->>0)::bigint; held_t := (op->'held'->>1)::bigint;
    posted_n := (op->'posted'->>0)::bigint; posted_t := (op->'posted'->>1)::bigint;
    FOR part IN SELECT value FROM jsonb_array_elements(op->'scopes') LOOP
      SELECT * INTO scope FROM viaticum.budgets b WHERE b.name = part->>0 FOR NO KEY UPDATE;
      IF root.name IS NULL THEN
        root := scope; moment := greatest(op->>'now', root.last_at);
        waited := greatest(waited, extract(epoch FROM clock_timestamp() - began));
      END IF;
      names := names || scope.name;
      fits := fits AND scope.time_window = part->>1;
      IF is_new THEN
        spent_n := scope.posted_nanousd; spent_t := scope.posted_tokens;
        fits := fits AND scope.state = 'open'
          AND greatest(spent_n + scope.held_nanousd + held_n, spent_t + scope.held_tokens + held_t)
            <= 9223372036854775807;
        IF fits AND scope.time_window <> '' THEN
          SELECT coalesce(sum(b.nanousd), 0), coalesce(sum(b.tokens), 0) INTO spent_n, spent_t
            FROM viaticum.buckets b WHERE b.budget = scope.name AND b.bucket >= (part->>2)::bigint;
        END IF;
        fits := fits AND coalesce(spent_n + scope.held_nanousd + held_n <= scope.limit_nanousd, true)
          AND coalesce(spent_t + scope.held_tokens + held_t <= scope.limit_tokens, true);
      END IF;
    END LOOP;
    fits := coalesce(fits, false) AND coalesce(moment < op->>'before', true);
    part := op->'hold';
    IF fits AND is_new THEN
      INSERT INTO viaticum.holds VALUES (part->>0, part->>1, part->>2, (part->>3)::bigint,
        (part->>4)::bigint, part->>5, part->>6, moment, part->>8, part->>9, part->>10,
        (part->>11)::bigint, part->>12) ON CONFLICT (key) DO NOTHING;
      fits := FOUND;
    ELSIF fits THEN
      UPDATE viaticum.holds h SET state = part->>2, until = part->>12, result = part->>8
        WHERE h.key = op->>'key' AND h.state = op->'expected'->>0 AND h.until = op->'expected'->>1
          AND h.result IS NULL;
      fits := FOUND;
    END IF;
    IF NOT fits THEN
      replies := replies || 'null'::jsonb;
      CONTINUE;
    END IF;
    place := root.entries; tip := root.head; ids := '[]';
    FOR part IN SELECT value FROM jsonb_array_elements(op->'entries') LOOP
      place := place + 1;
      tip := encode(sha256(convert_to('["' || tip || '", ' || (op->>'root') || ', ' || place || ', '
        || (part->>0) || ', "' || moment || '", ' || (part->>1) || ']', 'UTF8')), 'hex');
      INSERT INTO viaticum.entries AS e (root, number, hash, at, budget, key, kind, nanousd, tokens, overrun,
          usage, prices, note)
        VALUES (root.name, place, tip, moment, part->>2, op->>'key', part->>3, (part->>4)::bigint,
          (part->>5)::bigint, (part->>6)::bigint, part->>7, part->>8, part->>9)
        RETURNING e.id INTO made;
      ids := ids || to_jsonb(made);
    END LOOP;
    UPDATE viaticum.budgets b SET
        held_nanousd = b.held_nanousd + held_n, held_tokens = b.held_tokens + held_t,
        posted_nanousd = b.posted_nanousd + posted_n, posted_tokens = b.posted_tokens + posted_t,
        entries = CASE WHEN b.parent IS NULL THEN place ELSE b.entries END,
        head = CASE WHEN b.parent IS NULL THEN tip ELSE b.head END,
        last_at = CASE WHEN b.parent IS NULL THEN moment ELSE b.last_at END
      WHERE b.name = ANY (names);
    FOR part IN SELECT value FROM jsonb_array_elements(op->'posts') LOOP
      INSERT INTO viaticum.buckets AS b VALUES (part->>0, (part->>1)::bigint, posted_n, posted_t)
        ON CONFLICT (budget, bucket) DO UPDATE
          SET nanousd = b.nanousd + excluded.nanousd, tokens = b.tokens + excluded.tokens;
    END LOOP;
    replies := replies || jsonb_build_array(jsonb_build_array(moment, place, tip, ids));
  END LOOP;
  RETURN jsonb_build_array(waited, replies);
END $$;
"""

_LABELS = """
ALTER TABLE budgets ADD COLUMN only_labels TEXT NOT NULL DEFAULT '';
"""

MIGRATIONS: tuple[str, ...] = (_TABLES + _GUARDS + _VIEWS, _CLOCKS, _LEASES, _CALLS, _LABELS)
VERSION = len(MIGRATIONS)
