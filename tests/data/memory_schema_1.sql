-- A database of the first release (schema 1), as its store wrote it. Dumped by sqlite3's iterdump.
BEGIN TRANSACTION;
CREATE TABLE reflections (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    reflection_id TEXT NOT NULL UNIQUE,
    scope TEXT NOT NULL,
    text TEXT NOT NULL,
    run_id TEXT NOT NULL,
    experience_id TEXT NOT NULL,
    environment TEXT NOT NULL,
    task_id TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    reward_before REAL NOT NULL,
    reward_after REAL NOT NULL,
    success INTEGER NOT NULL,
    version INTEGER NOT NULL,
    created_microseconds INTEGER NOT NULL,
    deleted_version INTEGER
);
INSERT INTO "reflections" VALUES(1,'75da150cdef0dad5385a7088514f773d','run-1','Go right, then down.','run','run/1/0','lake','train/00000',1099511627776,0.0,1.0,1,1,1795718666526517,NULL);
INSERT INTO "reflections" VALUES(2,'b8b5f670ffee6e48d56dede38b666bff','run-1','Avoid the hole at (1, 2).
Then go left.','run','run/1/1','lake','train/00001',1099511627777,0.25,0.0,0,2,1795718666541482,NULL);
INSERT INTO "reflections" VALUES(3,'775b14141d890c46f50d9c91fa87d7d1','run-1','Ein Loch liegt rechts – gehe ü̈ber links.','run','run/1/2','lake','train/00002',1099511627778,0.5,1.0,1,3,1795718666556198,6);
INSERT INTO "reflections" VALUES(4,'27ed53dae0ed0b581b358f1071335bc7','run-1','It''s the key that "opens" the door; see NUL-free text.','run','run/1/3','maze','train/00003',1099511627779,0.0,1.0,1,4,1795718666565534,NULL);
INSERT INTO "reflections" VALUES(5,'df7d8980e4d71085a68aefbcb33f752e','run-1','Wait.','run','run/1/4','lake','train/00004',1099511627780,0.25,1.0,1,5,1795718666574178,7);
INSERT INTO "reflections" VALUES(6,'e619a263a58b28026c518302c97ed105','run-2','Go right, then down.','run','run/1/0','lake','train/00000',1099511627776,0.0,1.0,1,1,1795718666580237,6);
INSERT INTO "reflections" VALUES(7,'4f6954705831172c20c02ad7dedb5b33','run-2','Avoid the hole at (1, 2).
Then go left.','run','run/1/1','lake','train/00001',1099511627777,0.25,0.0,0,2,1795718666596535,NULL);
INSERT INTO "reflections" VALUES(8,'aec0151bf9f95c38534f2056dc327576','run-2','Ein Loch liegt rechts – gehe ü̈ber links.','run','run/1/2','lake','train/00002',1099511627778,0.5,1.0,1,3,1795718666604823,NULL);
INSERT INTO "reflections" VALUES(9,'f8d242cb17087d4e377878d97f05b8f6','run-2','It''s the key that "opens" the door; see NUL-free text.','run','run/1/3','maze','train/00003',1099511627779,0.0,1.0,1,4,1795718666612765,NULL);
INSERT INTO "reflections" VALUES(10,'bb924cd67300c9c1296bda79a7c501b3','run-2','Wait.','run','run/1/4','lake','train/00004',1099511627780,0.25,1.0,1,5,1795718666626031,NULL);
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO "schema_version" VALUES(1);
CREATE TABLE scopes (scope TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "scopes" VALUES('run-1',7);
INSERT INTO "scopes" VALUES('run-2',6);
CREATE INDEX retrieval ON reflections (scope, environment, success, version);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('reflections',10);
COMMIT;
