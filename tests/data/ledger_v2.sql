-- A ledger file of version 2, as viaticum wrote it at commit 0ee2f32: scopes below scopes, windows, holds in every state.
PRAGMA application_id = 1447641428;
PRAGMA user_version = 2;
BEGIN TRANSACTION;
CREATE TABLE buckets (
  budget TEXT NOT NULL REFERENCES budgets (name),
  bucket INTEGER NOT NULL,
  nanousd INTEGER NOT NULL,
  tokens INTEGER NOT NULL,
  PRIMARY KEY (budget, bucket)
) STRICT, WITHOUT ROWID
;
INSERT INTO "buckets" VALUES('team/day',1795820400,738,155);
INSERT INTO "buckets" VALUES('team/day/job',1795852800,737,120);
CREATE TABLE budgets (
  name TEXT PRIMARY KEY,
  parent TEXT REFERENCES budgets (name),
  root TEXT NOT NULL,
  depth INTEGER NOT NULL CHECK (depth >= 0),
  limit_nanousd INTEGER CHECK (limit_nanousd > 0),
  limit_tokens INTEGER CHECK (limit_tokens > 0),
  time_window TEXT NOT NULL DEFAULT '',
  state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'paused', 'closed')),
  posted_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (posted_nanousd >= 0),
  held_nanousd INTEGER NOT NULL DEFAULT 0 CHECK (held_nanousd >= 0),
  posted_tokens INTEGER NOT NULL DEFAULT 0 CHECK (posted_tokens >= 0),
  held_tokens INTEGER NOT NULL DEFAULT 0 CHECK (held_tokens >= 0),
  entries INTEGER NOT NULL DEFAULT 0,
  head TEXT NOT NULL DEFAULT '0000000000000000000000000000000000000000000000000000000000000000',
  last_at TEXT NOT NULL DEFAULT '',
  CHECK (limit_nanousd IS NOT NULL OR limit_tokens IS NOT NULL OR parent IS NOT NULL)
) STRICT
;
INSERT INTO "budgets" VALUES('team',NULL,'team',0,10000000,50000,'','open',738,2941,155,380,20,'bc1e5de3e38aef92d25f5ea3ba3d14f330d0c90b1a3b3c5988deec15f8bcdb5e','2026-11-29T08:02:26.000000+00:00');
INSERT INTO "budgets" VALUES('team/day','team','team',1,4000000,NULL,'day Europe/Berlin','open',738,2941,155,380,0,'0000000000000000000000000000000000000000000000000000000000000000','');
INSERT INTO "budgets" VALUES('team/day/job','team/day','team',2,NULL,NULL,'rolling hour','open',737,2941,120,380,0,'0000000000000000000000000000000000000000000000000000000000000000','');
INSERT INTO "budgets" VALUES('other',NULL,'other',0,NULL,800,'','open',2,0,390,0,10,'bc63ea00cc96e3a1ed0bb823150d8e287657ad3b96811c9efe98227b78d9d1fa','2026-11-29T08:02:21.000000+00:00');
INSERT INTO "budgets" VALUES('closed',NULL,'closed',0,NULL,5,'','closed',0,0,0,0,2,'f59535c16103514ec08cb1e1eefbeac054c01779df8501448678f708c76dd730','2026-11-29T08:02:23.000000+00:00');
CREATE TABLE entries (
  id INTEGER PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  key TEXT REFERENCES holds (key),
  kind TEXT NOT NULL CHECK (kind IN ('limit', 'pause', 'resume', 'close', 'reserve', 'dispatch', 'result',
    'post', 'void', 'expire', 'unknown')),
  nanousd INTEGER NOT NULL CHECK (nanousd >= 0),
  tokens INTEGER NOT NULL CHECK (tokens >= 0),
  overrun INTEGER NOT NULL CHECK (overrun >= 0),
  at TEXT NOT NULL,
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  note TEXT NOT NULL,
  root TEXT NOT NULL REFERENCES budgets (name),
  number INTEGER NOT NULL,
  hash TEXT NOT NULL,
  CHECK ((key IS NULL) = (kind IN ('limit', 'pause', 'resume', 'close')))
) STRICT
;
INSERT INTO "entries" VALUES(1,'team',NULL,'limit',10000000,50000,0,'2026-11-28T08:00:01.000000+00:00','{}','{}','{}','team',1,'2fd2f9dd164014015c1ffd44862b7fa27b594883d2d65df3d8f7d87b72e8da6f');
INSERT INTO "entries" VALUES(2,'team/day',NULL,'limit',4000000,0,0,'2026-11-28T08:00:02.000000+00:00','{}','{}','{"parent": "team", "window": "day Europe/Berlin"}','team',2,'576e8e27d73355266580f33b1f79446c8b4d344d80cb04098b212b608eb3c002');
INSERT INTO "entries" VALUES(3,'team/day/job',NULL,'limit',0,0,0,'2026-11-28T08:00:03.000000+00:00','{}','{}','{"parent": "team/day", "window": "rolling hour"}','team',3,'a71f7d000c1642b121b3da3012dbf0f68e9ada8c1deb9020b7a716a9d1a3053d');
INSERT INTO "entries" VALUES(4,'other',NULL,'limit',0,900,0,'2026-11-28T08:00:04.000000+00:00','{}','{}','{}','other',1,'cfca97a72b2d97afdd14a41c2d75b57343bd41c7eb6d22ce6642aaaef31c46d7');
INSERT INTO "entries" VALUES(5,'team/day/job','posted','reserve',1300,150,0,'2026-11-28T08:00:05.000000+00:00','{"large": {"input_tokens": 100, "output_tokens": 50}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','{"lease": 3600, "parameters": "7a160a56eccfdb867c16771db3cc3a789f06a1245c8bbd7d8c2f6eaa3645852d", "tags": {"strategy": "cot"}, "until": "2026-11-28T09:00:05.000000+00:00"}','team',4,'43a1e306e17d8c17266db51fcf15ca92eb8dcd164a887c57d6f4cdf797d6b4ce');
INSERT INTO "entries" VALUES(6,'team/day/job','posted','dispatch',0,0,0,'2026-11-28T08:00:05.000000+00:00','{}','{}','{"until": "2026-11-28T09:00:05.000000+00:00"}','team',5,'ac12cfce006d157708d02f94dc502c1bce9c5330e832c0fd2bee58453531e3d0');
INSERT INTO "entries" VALUES(7,'team/day/job','posted','post',737,120,0,'2026-11-28T08:00:06.000000+00:00','{"large": {"cached_input_tokens": 40, "input_tokens": 90, "milliseconds": 1500, "output_tokens": 30, "reasoning_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','{"costs": {"large": 737}, "result": "5d26ee78aa1d5dacdfc6d327369a7647261a523b38a2c4ae72f7832bd15665fb", "tags": {"strategy": "cot"}, "usage": "reported"}','team',6,'f4ea0a2c1a2f28e24000ba6f77c2427461fe1599a1e45a03cfa556bf40885a99');
INSERT INTO "entries" VALUES(8,'team/day','overrun','reserve',1,20,0,'2026-11-28T08:00:07.000000+00:00','{"small": {"input_tokens": 10, "output_tokens": 10}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"lease": 3600, "until": "2026-11-28T09:00:07.000000+00:00"}','team',7,'8fdf3c92b2c3213b4339ccaffc113d947372f8c4a4a9783f5ec6bd03908f2f6c');
INSERT INTO "entries" VALUES(9,'team/day','overrun','dispatch',0,0,0,'2026-11-28T08:00:08.000000+00:00','{}','{}','{"until": "2026-11-28T09:00:08.000000+00:00"}','team',8,'87a4f1aabf26b5872bece63c4643206c1c00946e49e1e9f7fc185b2d711d46e4');
INSERT INTO "entries" VALUES(10,'team/day','overrun','post',1,35,0,'2026-11-28T08:00:09.000000+00:00','{"small": {"input_tokens": 10, "output_tokens": 25}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"costs": {"small": 1}, "overrun_tokens": 15, "usage": "reported"}','team',9,'798b7ae76d2901a30f3505b4d3b82ed8929e533c467f16532ee3f89a156201b6');
INSERT INTO "entries" VALUES(11,'team/day/job','void','reserve',131,35,0,'2026-11-29T08:00:10.000000+00:00','{"large": {"input_tokens": 10, "output_tokens": 5}, "small": {"input_tokens": 10, "output_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}, "small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"lease": 3600, "until": "2026-11-29T09:00:10.000000+00:00"}','team',10,'274556f8bb6f1fa64080a6bed3b7f18e348d6633a8f65ce604c5d27c7bb5f7e9');
INSERT INTO "entries" VALUES(12,'team/day/job','void','void',131,35,0,'2026-11-29T08:00:11.000000+00:00','{"large": {"input_tokens": 10, "output_tokens": 5}, "small": {"input_tokens": 10, "output_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}, "small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{}','team',11,'e261c937b5abd0bd358da914b06d999e4d4e633e031051a043db9980d694877b');
INSERT INTO "entries" VALUES(13,'team','expired','reserve',1,20,0,'2026-11-29T08:00:12.000000+00:00','{"small": {"input_tokens": 10, "output_tokens": 10}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"lease": 60, "until": "2026-11-29T08:01:12.000000+00:00"}','team',12,'38ce1ea021bfe9e93eb16f41abba2841ce9cb2d0143b038febd593bb93183e86');
INSERT INTO "entries" VALUES(14,'team/day/job','unknown','reserve',260,30,0,'2026-11-29T08:00:13.000000+00:00','{"large": {"input_tokens": 20, "output_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','{"lease": 60, "until": "2026-11-29T08:01:13.000000+00:00"}','team',13,'173fde108723ce48e45ad6d9c37b9b4403da8fcf47748734aae63776b72a7529');
INSERT INTO "entries" VALUES(15,'team/day/job','unknown','dispatch',0,0,0,'2026-11-29T08:00:13.000000+00:00','{}','{}','{"until": "2026-11-29T08:01:13.000000+00:00"}','team',14,'cf5708dd7c1e6fe863552ee8420e96a5770e6aeb1affb2753029882547878012');
INSERT INTO "entries" VALUES(16,'team','expired','expire',1,20,0,'2026-11-29T08:02:15.000000+00:00','{"small": {"input_tokens": 10, "output_tokens": 10}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{}','team',15,'00c6571cf26082e884271f80ddca70b6247cfefaf8ae57aa31dc3fe8a45ffbaa');
INSERT INTO "entries" VALUES(17,'team/day/job','unknown','unknown',260,30,0,'2026-11-29T08:02:16.000000+00:00','{"large": {"input_tokens": 20, "output_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','{}','team',16,'ae65742d657ce4a0d9fa87332e2998f9c883482deeb649c0445cfd51243ad79c');
INSERT INTO "entries" VALUES(18,'other','one','reserve',1,150,0,'2026-11-29T08:02:17.000000+00:00','{"small": {"input_tokens": 100, "output_tokens": 50}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"lease": 3600, "tags": {"strategy": "direct"}, "until": "2026-11-29T09:02:17.000000+00:00"}','other',2,'527f1d4b8667246b082fda200c4e051d7f3f0855fcb07923dc4d9c880c82fd30');
INSERT INTO "entries" VALUES(19,'other','one','dispatch',0,0,0,'2026-11-29T08:02:17.000000+00:00','{}','{}','{"until": "2026-11-29T09:02:17.000000+00:00"}','other',3,'dc30da9b39fb5e6cb93780b9a499e71084435057862b843a36f07d3944581e5c');
INSERT INTO "entries" VALUES(20,'other','two','reserve',1,250,0,'2026-11-29T08:02:17.000000+00:00','{"small": {"input_tokens": 200, "output_tokens": 50}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"lease": 3600, "until": "2026-11-29T09:02:17.000000+00:00"}','other',4,'ef6d90805bc15e45c48530ac917572efc397c04b2fee90e5dcbff0281c217553');
INSERT INTO "entries" VALUES(21,'other','two','dispatch',0,0,0,'2026-11-29T08:02:17.000000+00:00','{}','{}','{"until": "2026-11-29T09:02:17.000000+00:00"}','other',5,'b2ea1e9e1408d621bf25a92559af330a66d26dc22bf18bdf5713b118c742467e');
INSERT INTO "entries" VALUES(22,'other','one','post',1,140,0,'2026-11-29T08:02:18.000000+00:00','{"small": {"input_tokens": 100, "output_tokens": 40}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"costs": {"small": 1}, "tags": {"strategy": "direct"}, "usage": "reported"}','other',6,'31d65f2297b4a86059465a17b23120e0fe4b63d19c6f4e1741dae0ab265d4241');
INSERT INTO "entries" VALUES(23,'other','two','post',1,250,0,'2026-11-29T08:02:18.000000+00:00','{"small": {"input_tokens": 200, "output_tokens": 50}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"costs": {"small": 1}, "result": "b85d38dc71a8027700bebd3c30d39424852cf532883d88f0a0d992d3bf0eba9b", "usage": "missing"}','other',7,'51c0d79102f6a80257560792b1311277d86af330ea961249fb41cd2d00baec78');
INSERT INTO "entries" VALUES(24,'other',NULL,'limit',0,800,0,'2026-11-29T08:02:19.000000+00:00','{}','{}','{}','other',8,'602763ac49df7310fb28829c51b2138565b1d527b31742db30fcef9660f3e84a');
INSERT INTO "entries" VALUES(25,'other',NULL,'pause',0,0,0,'2026-11-29T08:02:20.000000+00:00','{}','{}','{"reason": "lunch"}','other',9,'db46af52919997438272e129abce13016565b90ef557686a19303beb2db215d2');
INSERT INTO "entries" VALUES(26,'other',NULL,'resume',0,0,0,'2026-11-29T08:02:21.000000+00:00','{}','{}','{}','other',10,'bc63ea00cc96e3a1ed0bb823150d8e287657ad3b96811c9efe98227b78d9d1fa');
INSERT INTO "entries" VALUES(27,'closed',NULL,'limit',0,5,0,'2026-11-29T08:02:22.000000+00:00','{}','{}','{}','closed',1,'0ef0d4dfb08b6a25a81080cc825a7ed8e917dd8f2c297e5784952e58ad8c8036');
INSERT INTO "entries" VALUES(28,'closed',NULL,'close',0,0,0,'2026-11-29T08:02:23.000000+00:00','{}','{}','{"reason": "done"}','closed',2,'f59535c16103514ec08cb1e1eefbeac054c01779df8501448678f708c76dd730');
INSERT INTO "entries" VALUES(29,'team/day/job','reserved','reserve',1,10,0,'2026-11-29T08:02:24.000000+00:00','{"small": {"input_tokens": 7, "output_tokens": 3}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','{"lease": 3600, "until": "2026-11-29T09:02:24.000000+00:00"}','team',17,'76901b437a3261937a62e69fd27218885f71c3b9a88a8c51b1a6b57b3dfcbe8e');
INSERT INTO "entries" VALUES(30,'team/day/job','reserved','result',0,0,0,'2026-11-29T08:02:25.000000+00:00','{}','{}','{"result": "738123cec32530fb4e99dcaf1a27adfaaddedca59c05832e1a4abd38581cee9d"}','team',18,'f9de378e956bcf763a27dfafc8adbd829cbb9eb36387a4acc3bc6156c5ed3c67');
INSERT INTO "entries" VALUES(31,'team/day/job','open','reserve',2680,340,0,'2026-11-29T08:02:26.000000+00:00','{"large": {"input_tokens": 300, "output_tokens": 40}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','{"lease": 3600, "parameters": "01300696108cac6398f060feee90677fd5102214be804273d73d1bc1a8f403d4", "tags": {"strategy": "direct"}, "until": "2026-11-29T09:02:26.000000+00:00"}','team',19,'2c275626e763bd2ee0ff1c02ca5284463e1184d699b2056f8b9f734cad1a08c8');
INSERT INTO "entries" VALUES(32,'team/day/job','open','dispatch',0,0,0,'2026-11-29T08:02:26.000000+00:00','{}','{}','{"until": "2026-11-29T09:02:26.000000+00:00"}','team',20,'bc1e5de3e38aef92d25f5ea3ba3d14f330d0c90b1a3b3c5988deec15f8bcdb5e');
CREATE TABLE holds (
  key TEXT PRIMARY KEY,
  budget TEXT NOT NULL REFERENCES budgets (name),
  state TEXT NOT NULL
    CHECK (state IN ('reserved', 'dispatched', 'posted', 'void', 'expired', 'unknown')),
  held_nanousd INTEGER NOT NULL CHECK (held_nanousd >= 0),
  held_tokens INTEGER NOT NULL CHECK (held_tokens >= 0),
  usage TEXT NOT NULL,
  prices TEXT NOT NULL,
  created TEXT NOT NULL,
  result TEXT,
  parameters TEXT NOT NULL,
  tags TEXT NOT NULL,
  lease INTEGER NOT NULL,
  until TEXT NOT NULL
) STRICT, WITHOUT ROWID
;
INSERT INTO "holds" VALUES('expired','team','expired',1,20,'{"small": {"input_tokens": 10, "output_tokens": 10}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','2026-11-29T08:00:12.000000+00:00',NULL,'','{}',60,'2026-11-29T08:01:12.000000+00:00');
INSERT INTO "holds" VALUES('one','other','posted',1,150,'{"small": {"input_tokens": 100, "output_tokens": 50}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','2026-11-29T08:02:17.000000+00:00',NULL,'','{"strategy": "direct"}',3600,'2026-11-29T09:02:17.000000+00:00');
INSERT INTO "holds" VALUES('open','team/day/job','dispatched',2680,340,'{"large": {"input_tokens": 300, "output_tokens": 40}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','2026-11-29T08:02:26.000000+00:00',NULL,'01300696108cac6398f060feee90677fd5102214be804273d73d1bc1a8f403d4','{"strategy": "direct"}',3600,'2026-11-29T09:02:26.000000+00:00');
INSERT INTO "holds" VALUES('overrun','team/day','posted',1,20,'{"small": {"input_tokens": 10, "output_tokens": 10}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','2026-11-28T08:00:07.000000+00:00',NULL,'','{}',3600,'2026-11-28T09:00:08.000000+00:00');
INSERT INTO "holds" VALUES('posted','team/day/job','posted',1300,150,'{"large": {"input_tokens": 100, "output_tokens": 50}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','2026-11-28T08:00:05.000000+00:00','{"text": "72"}','7a160a56eccfdb867c16771db3cc3a789f06a1245c8bbd7d8c2f6eaa3645852d','{"strategy": "cot"}',3600,'2026-11-28T09:00:05.000000+00:00');
INSERT INTO "holds" VALUES('reserved','team/day/job','reserved',1,10,'{"small": {"input_tokens": 7, "output_tokens": 3}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','2026-11-29T08:02:24.000000+00:00','"early"','','{}',3600,'2026-11-29T09:02:24.000000+00:00');
INSERT INTO "holds" VALUES('two','other','posted',1,250,'{"small": {"input_tokens": 200, "output_tokens": 50}}','{"small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','2026-11-29T08:02:17.000000+00:00','"two"','','{}',3600,'2026-11-29T09:02:17.000000+00:00');
INSERT INTO "holds" VALUES('unknown','team/day/job','unknown',260,30,'{"large": {"input_tokens": 20, "output_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}}','2026-11-29T08:00:13.000000+00:00',NULL,'','{}',60,'2026-11-29T08:01:13.000000+00:00');
INSERT INTO "holds" VALUES('void','team/day/job','void',131,35,'{"large": {"input_tokens": 10, "output_tokens": 5}, "small": {"input_tokens": 10, "output_tokens": 10}}','{"large": {"cached_nanousd_per_million": 300000, "input_nanousd_per_million": 3000000, "nanousd_per_second": 50, "output_nanousd_per_million": 15000000, "reasoning_nanousd_per_million": 20000000, "tiers": [{"above_tokens": 200, "input_nanousd_per_million": 6000000, "output_nanousd_per_million": 22000000}]}, "small": {"input_nanousd_per_million": 1000, "output_nanousd_per_million": 2000, "version": "list 3"}}','2026-11-29T08:00:10.000000+00:00',NULL,'','{}',3600,'2026-11-29T09:00:10.000000+00:00');
CREATE INDEX budgets_by_parent ON budgets (parent);
CREATE INDEX open_holds ON holds (budget, state, until) WHERE state IN ('reserved', 'dispatched', 'unknown');
CREATE UNIQUE INDEX one_place_in_the_chain ON entries (root, number);
CREATE UNIQUE INDEX one_reserve_a_key ON entries (key) WHERE kind = 'reserve';
CREATE UNIQUE INDEX one_end_a_key ON entries (key) WHERE kind IN ('post', 'void', 'expire');
CREATE TRIGGER entries_are_not_replaced BEFORE INSERT ON entries
    WHEN EXISTS (SELECT 1 FROM entries WHERE id = NEW.id)
      OR EXISTS (SELECT 1 FROM entries WHERE root = NEW.root AND number = NEW.number)
      OR (NEW.kind = 'reserve' AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind = 'reserve'))
      OR (NEW.kind IN ('post', 'void', 'expire')
          AND EXISTS (SELECT 1 FROM entries WHERE key = NEW.key AND kind IN ('post', 'void', 'expire')))
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_are_not_updated BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_are_not_deleted BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds
    WHEN (OLD.state IN ('posted', 'void', 'expired') AND NEW.state <> OLD.state)
      OR (OLD.state <> 'reserved' AND NEW.state IN ('reserved', 'expired') AND NEW.state <> OLD.state)
      OR (OLD.state = 'unknown' AND NEW.state = 'dispatched')
      OR (OLD.result IS NOT NULL AND NEW.result IS NOT OLD.result)
      OR NEW.key <> OLD.key OR NEW.budget <> OLD.budget
      OR NEW.held_nanousd <> OLD.held_nanousd OR NEW.held_tokens <> OLD.held_tokens
      OR NEW.usage <> OLD.usage OR NEW.prices <> OLD.prices OR NEW.created <> OLD.created
      OR NEW.parameters <> OLD.parameters OR NEW.tags <> OLD.tags OR NEW.lease <> OLD.lease
    BEGIN SELECT RAISE(ABORT, 'a hold ends once and keeps its terms'); END;
CREATE TRIGGER holds_are_not_deleted BEFORE DELETE ON holds
    BEGIN SELECT RAISE(ABORT, 'holds are kept'); END;
CREATE TRIGGER budgets_are_not_deleted BEFORE DELETE ON budgets
    BEGIN SELECT RAISE(ABORT, 'budgets are kept'); END;
CREATE VIEW spend_by_scope AS
    SELECT name, parent, state, time_window,
      limit_nanousd / 1e9 AS limit_usd, posted_nanousd / 1e9 AS posted_usd, held_nanousd / 1e9 AS held_usd,
      limit_tokens, posted_tokens, held_tokens
    FROM budgets ORDER BY name;
CREATE VIEW spend_by_model AS
    SELECT cost.key AS model, count(*) AS calls, sum(cost.value) / 1e9 AS usd,
      sum(json_extract(used.value, '$.input_tokens')) AS input_tokens,
      sum(json_extract(used.value, '$.output_tokens')) AS output_tokens
    FROM entries e, json_each(e.note, '$.costs') cost, json_each(e.usage) used
    WHERE e.kind = 'post' AND used.key = cost.key GROUP BY cost.key ORDER BY cost.key;
CREATE VIEW spend_by_strategy AS
    SELECT coalesce(json_extract(note, '$.tags.strategy'), '') AS strategy, count(*) AS calls,
      sum(nanousd) / 1e9 AS usd, sum(tokens) AS tokens
    FROM entries WHERE kind = 'post' GROUP BY 1 ORDER BY 1;
CREATE VIEW spend_by_day AS
    SELECT substr(at, 1, 10) AS day, count(*) AS calls, sum(nanousd) / 1e9 AS usd, sum(tokens) AS tokens
    FROM entries WHERE kind = 'post' GROUP BY 1 ORDER BY 1;
COMMIT;
