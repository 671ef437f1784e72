-- A ledger file of version 1, as viaticum wrote it before scopes: migrations are tested on it.
PRAGMA application_id = 1447641428;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE budgets (
  name TEXT PRIMARY KEY,
  limit_nanousd INTEGER CHECK (limit_nanousd > 0),
  limit_tokens INTEGER CHECK (limit_tokens > 0),
  posted_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (posted_nanousd >= 0),
  held_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (held_nanousd >= 0),
  posted_tokens INTEGER NOT NULL DEFAULT 0 CHECK (posted_tokens >= 0),
  held_tokens INTEGER NOT NULL DEFAULT 0 CHECK (held_tokens >= 0),
  CHECK (limit_nanousd IS NOT NULL OR limit_tokens IS NOT NULL)
) STRICT
;
INSERT INTO "budgets" VALUES('demo',900,500,353,70,35,30);
INSERT INTO "budgets" VALUES('other',NULL,100,0,70,0,30);
CREATE TABLE entries (
  id INTEGER PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  key TEXT REFERENCES holds (key),
  kind TEXT NOT NULL CHECK (kind IN ('limit', 'reserve', 'post', 'void')),
  nanousd INTEGER NOT NULL CHECK (nanousd >= 0),
  tokens INTEGER NOT NULL CHECK (tokens >= 0),
  overrun INTEGER NOT NULL CHECK (overrun >= 0),
  at TEXT NOT NULL,
  usage TEXT NOT NULL,
  CHECK ((key IS NULL) = (kind = 'limit'))
) STRICT
;
INSERT INTO "entries" VALUES(1,'demo',NULL,'limit',1000,500,0,'2026-11-21T14:46:44.207100+00:00','{}');
INSERT INTO "entries" VALUES(2,'other',NULL,'limit',0,100,0,'2026-11-21T14:46:44.218662+00:00','{}');
INSERT INTO "entries" VALUES(3,'demo','held','reserve',70,30,0,'2026-11-21T14:46:44.222877+00:00','{"small": {"input_tokens": 10, "output_tokens": 20}}');
INSERT INTO "entries" VALUES(4,'demo','posted','reserve',70,30,0,'2026-11-21T14:46:44.226715+00:00','{"small": {"input_tokens": 10, "output_tokens": 20}}');
INSERT INTO "entries" VALUES(5,'demo','posted','post',25,15,0,'2026-11-21T14:46:44.230790+00:00','{"small": {"input_tokens": 10, "output_tokens": 5}}');
INSERT INTO "entries" VALUES(6,'demo','void','reserve',70,30,0,'2026-11-21T14:46:44.234699+00:00','{"small": {"input_tokens": 10, "output_tokens": 20}}');
INSERT INTO "entries" VALUES(7,'demo','void','void',70,30,0,'2026-11-21T14:46:44.242695+00:00','{"small": {"input_tokens": 10, "output_tokens": 20}}');
INSERT INTO "entries" VALUES(8,'other','attached','reserve',70,30,0,'2026-11-21T14:46:44.245696+00:00','{"small": {"input_tokens": 10, "output_tokens": 20}}');
INSERT INTO "entries" VALUES(9,'demo','both','reserve',220,20,0,'2026-11-21T14:46:44.254733+00:00','{"large": {"input_tokens": 5, "output_tokens": 5}, "small": {"input_tokens": 5, "output_tokens": 5}}');
INSERT INTO "entries" VALUES(10,'demo','both','post',328,20,108,'2026-11-21T14:46:44.258743+00:00','{"large": {"input_tokens": 5, "output_tokens": 9}, "small": {"input_tokens": 5, "output_tokens": 1}}');
INSERT INTO "entries" VALUES(11,'demo',NULL,'limit',900,500,0,'2026-11-21T14:46:44.262662+00:00','{}');
CREATE TABLE holds (
  key TEXT PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  state TEXT NOT NULL CHECK (state IN ('reserved', 'posted', 'void')),
  held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
  held_tokens INTEGER NOT NULL CHECK (held_tokens >= 0),
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  created TEXT NOT NULL,
  result TEXT
) STRICT
;
INSERT INTO "holds" VALUES('held','demo','reserved',70,30,'{"small": {"input_tokens": 10, "output_tokens": 20}}','{"small": {"input_nanousd_per_million": 1000000, "output_nanousd_per_million": 3000000}}','2026-11-21T14:46:44.222701+00:00',NULL);
INSERT INTO "holds" VALUES('posted','demo','posted',70,30,'{"small": {"input_tokens": 10, "output_tokens": 20}}','{"small": {"input_nanousd_per_million": 1000000, "output_nanousd_per_million": 3000000}}','2026-11-21T14:46:44.226605+00:00','{"text": "72"}');
INSERT INTO "holds" VALUES('void','demo','void',70,30,'{"small": {"input_tokens": 10, "output_tokens": 20}}','{"small": {"input_nanousd_per_million": 1000000, "output_nanousd_per_million": 3000000}}','2026-11-21T14:46:44.234596+00:00',NULL);
INSERT INTO "holds" VALUES('attached','other','reserved',70,30,'{"small": {"input_tokens": 10, "output_tokens": 20}}','{"small": {"input_nanousd_per_million": 1000000, "output_nanousd_per_million": 3000000}}','2026-11-21T14:46:44.245590+00:00','"paid"');
INSERT INTO "holds" VALUES('both','demo','posted',220,20,'{"large": {"input_tokens": 5, "output_tokens": 5}, "small": {"input_tokens": 5, "output_tokens": 5}}','{"large": {"input_nanousd_per_million": 10000000, "output_nanousd_per_million": 30000000}, "small": {"input_nanousd_per_million": 1000000, "output_nanousd_per_million": 3000000}}','2026-11-21T14:46:44.254609+00:00',NULL);
CREATE INDEX holds_by_budget ON holds (budget, state);
CREATE INDEX entries_by_budget ON entries (budget);
CREATE UNIQUE INDEX one_reserve_a_key ON entries (key) WHERE kind = 'reserve';
CREATE UNIQUE INDEX one_end_a_key ON entries (key) WHERE kind IN ('post', 'void');
CREATE TRIGGER entries_are_not_replaced BEFORE INSERT ON entries
    WHEN EXISTS (SELECT 1 FROM entries WHERE id = NEW.id)
      OR (NEW.kind = 'reserve' AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind = 'reserve'))
      OR (NEW.kind IN ('post', 'void')
          AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind IN ('post', 'void')))
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_are_not_updated BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_are_not_deleted BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds
    WHEN (OLD.state <> 'reserved' AND NEW.state <> OLD.state)
      OR (OLD.result IS NOT NULL AND NEW.result IS NOT OLD.result)
      OR NEW.key <> OLD.key OR NEW.budget <> OLD.budget
      OR NEW.held_nanousd <> OLD.held_nanousd OR NEW.held_tokens <> OLD.held_tokens
      OR NEW.usage <> OLD.usage OR NEW.prices <> OLD.prices OR NEW.created <> OLD.created
    BEGIN SELECT RAISE(ABORT, 'a hold ends once and keeps its terms'); END;
CREATE TRIGGER holds_are_not_deleted BEFORE DELETE ON holds
    BEGIN SELECT RAISE(ABORT, 'holds are kept'); END;
CREATE TRIGGER budgets_are_not_deleted BEFORE DELETE ON budgets
    BEGIN SELECT RAISE(ABORT, 'budgets are kept'); END;
COMMIT;
