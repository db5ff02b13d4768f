"""The store's schema as history: each step small, applied once, in order, never edited afterwards.

One dialect serves SQLite and PostgreSQL: the few words in which they differ are replaced by `database`. It
ignores how rows are read and written (store).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from understudy.errors import StoreError

if TYPE_CHECKING:
    from understudy.traffic.database import Database


class Migration(NamedTuple):
    """One step of the schema's history; its number is its place in `HISTORY`, from 1."""

    name: str
    statements: tuple[str, ...]


M001_CREATE_CALLS = Migration(
    "m001_create_calls",
    (
        """
        CREATE TABLE calls (
            key TEXT PRIMARY KEY,
            at REAL NOT NULL,
            alias TEXT NOT NULL,
            target TEXT NOT NULL,
            answered_by TEXT NOT NULL,
            route TEXT NOT NULL,
            status INTEGER NOT NULL,
            stream INTEGER NOT NULL,
            prompt_tokens INTEGER,
            completion_tokens INTEGER,
            cached_tokens INTEGER,
            reasoning_tokens INTEGER,
            audio_tokens INTEGER,
            usage_estimated INTEGER NOT NULL,
            ttft_s REAL NOT NULL,
            total_s REAL NOT NULL,
            finish_reason TEXT NOT NULL,
            task_id TEXT NOT NULL,
            tags TEXT NOT NULL,
            caller TEXT NOT NULL,
            prompt_hash BLOB,
            frame INTEGER,
            messages INTEGER,
            response INTEGER
        ) WITHOUT ROWID
        """,
        # keys are UUIDv7, so this index also orders an alias's calls by time
        "CREATE INDEX calls_by_alias ON calls (alias, key)",
    ),
)

M002_CREATE_BLOBS = Migration(
    "m002_create_blobs",
    (
        # digests stand apart so that blobs are appended in order: a random primary key leaves pages 69% full
        "CREATE TABLE blobs (id INTEGER PRIMARY KEY, parent INTEGER NOT NULL, data BLOB NOT NULL)",
        "CREATE TABLE digests (digest BLOB PRIMARY KEY, blob INTEGER NOT NULL) WITHOUT ROWID",
    ),
)

M003_CREATE_ATTEMPTS = Migration(
    "m003_create_attempts",
    (
        """
        CREATE TABLE attempts (
            call TEXT NOT NULL,
            number INTEGER NOT NULL,
            target TEXT NOT NULL,
            status INTEGER NOT NULL,
            billed TEXT NOT NULL,
            started REAL NOT NULL,
            ended REAL NOT NULL,
            error TEXT NOT NULL,
            PRIMARY KEY (call, number)
        ) WITHOUT ROWID
        """,
    ),
)

M004_CREATE_SEGMENTS = Migration(
    "m004_create_segments",
    (
        """
        CREATE TABLE segments (
            name TEXT PRIMARY KEY, reached INTEGER NOT NULL, faults INTEGER NOT NULL
        ) WITHOUT ROWID
        """,
    ),
)

M005_CREATE_FEEDBACK = Migration(
    "m005_create_feedback",
    (
        """
        CREATE TABLE feedback (
            key TEXT PRIMARY KEY,
            call TEXT NOT NULL,
            at REAL NOT NULL,
            metric TEXT NOT NULL,
            value REAL,
            expected TEXT NOT NULL,
            comment TEXT NOT NULL
        ) WITHOUT ROWID
        """,
        "CREATE INDEX feedback_by_call ON feedback (call, key)",
    ),
)

M006_CREATE_ROUTES = Migration(
    "m006_create_routes",
    (
        """
        CREATE TABLE routes (
            alias TEXT PRIMARY KEY,
            version INTEGER NOT NULL,
            model TEXT NOT NULL,
            fallback TEXT NOT NULL,
            stage TEXT NOT NULL,
            changed_at REAL NOT NULL,
            changed_by TEXT NOT NULL,
            reason TEXT NOT NULL,
            evidence TEXT NOT NULL
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE route_history (
            alias TEXT NOT NULL,
            version INTEGER NOT NULL,
            model TEXT NOT NULL,
            fallback TEXT NOT NULL,
            stage TEXT NOT NULL,
            changed_at REAL NOT NULL,
            changed_by TEXT NOT NULL,
            reason TEXT NOT NULL,
            evidence TEXT NOT NULL,
            PRIMARY KEY (alias, version)
        ) WITHOUT ROWID
        """,
    ),
)

M007_CREATE_KEYS = Migration(
    "m007_create_keys",
    (
        """
        CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            hash BLOB NOT NULL,
            name TEXT NOT NULL,
            created REAL NOT NULL,
            revoked REAL
        ) WITHOUT ROWID
        """,
    ),
)

M008_ADD_COST = Migration(
    "m008_add_cost",
    (
        "ALTER TABLE calls ADD COLUMN cost_usd REAL",
        "ALTER TABLE calls ADD COLUMN price_date TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE calls ADD COLUMN price_source TEXT NOT NULL DEFAULT ''",
    ),
)

M009_ADD_SHAPE = Migration(
    "m009_add_shape",
    (
        # what planning asks of every call, so that 100,000 calls are ranked without opening their texts
        "ALTER TABLE calls ADD COLUMN modalities TEXT NOT NULL DEFAULT 'text'",
        "ALTER TABLE calls ADD COLUMN features TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE calls ADD COLUMN max_tokens INTEGER NOT NULL DEFAULT 0",
    ),
)

M010_ADD_USAGE_DETAILS = Migration(
    "m010_add_usage_details",
    (
        # spoken and cache-write tokens have prices of their own
        "ALTER TABLE calls ADD COLUMN output_audio_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE calls ADD COLUMN cache_write_tokens INTEGER NOT NULL DEFAULT 0",
    ),
)

M011_CREATE_HOURS = Migration(
    "m011_create_hours",
    (
        """
        CREATE TABLE hours (
            hour INTEGER NOT NULL,
            alias TEXT NOT NULL,
            target TEXT NOT NULL,
            calls INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            priced INTEGER NOT NULL,
            prompt_tokens REAL NOT NULL,
            completion_tokens REAL NOT NULL,
            cached_tokens REAL NOT NULL,
            cost_usd REAL NOT NULL,
            total_s REAL NOT NULL,
            PRIMARY KEY (hour, alias, target)
        ) WITHOUT ROWID
        """,
        # a cast cuts in SQLite and rounds in PostgreSQL; taking one off where it is too large floors in both
        """
        INSERT INTO hours
        SELECT
            CAST(at / 3600 AS INTEGER) - CASE WHEN CAST(at / 3600 AS INTEGER) * 3600 > at THEN 1 ELSE 0 END,
            alias, target, COUNT(*), SUM(CASE WHEN status >= 400 THEN 1 ELSE 0 END), COUNT(cost_usd),
            COALESCE(SUM(prompt_tokens * 1.0), 0), COALESCE(SUM(completion_tokens * 1.0), 0),
            COALESCE(SUM(cached_tokens * 1.0), 0), COALESCE(SUM(cost_usd), 0), SUM(total_s)
        FROM calls GROUP BY 1, 2, 3
        """,
    ),
)

M012_FIND_FAILURES_AND_TASKS = Migration(
    "m012_find_failures_and_tasks",
    (
        # partial: failures and tasked calls are few, so these cost nothing on the others
        "CREATE INDEX calls_failed ON calls (key) WHERE status >= 400",
        "CREATE INDEX calls_failed_by_alias ON calls (alias, key) WHERE status >= 400",
        "CREATE INDEX calls_by_task ON calls (task_id, key) WHERE task_id <> ''",
    ),
)

M013_FIND_FAILURES_BY_STATUS = Migration(
    "m013_find_failures_by_status",
    (
        # with the status in the index, looking for one of them opens no other row
        "DROP INDEX calls_failed",
        "DROP INDEX calls_failed_by_alias",
        "CREATE INDEX calls_failed ON calls (key, status) WHERE status >= 400",
        "CREATE INDEX calls_failed_by_alias ON calls (alias, key, status) WHERE status >= 400",
    ),
)

M014_ADD_RETENTION = Migration(
    "m014_add_retention",
    (
        # which blob names which lifted one; without it a text in use could not be told from a forgotten one
        "CREATE TABLE lifts (blob INTEGER NOT NULL, lifted INTEGER NOT NULL, PRIMARY KEY (blob, lifted)) "
        "WITHOUT ROWID",
        "CREATE INDEX lifts_by_lifted ON lifts (lifted, blob)",
        # of the blobs there so far it is not known: this row says up to where, and they are never deleted
        "INSERT INTO lifts SELECT 0, MAX(id) FROM blobs HAVING COUNT(*) > 0",
        # partial: most conversations are one blob long
        "CREATE INDEX blobs_by_parent ON blobs (parent) WHERE parent <> 0",
        "CREATE TABLE released (blob INTEGER PRIMARY KEY)",
    ),
)

M015_ADD_LIMITS = Migration(
    "m015_add_limits",
    (
        "ALTER TABLE keys ADD COLUMN requests_per_minute INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE keys ADD COLUMN usd_per_day REAL NOT NULL DEFAULT 0",
        "ALTER TABLE keys ADD COLUMN usd_per_month REAL NOT NULL DEFAULT 0",
        """
        CREATE TABLE allowances (
            key TEXT NOT NULL, kind TEXT NOT NULL, period INTEGER NOT NULL, used REAL NOT NULL,
            PRIMARY KEY (key, kind, period)
        ) WITHOUT ROWID
        """,
    ),
)

M016_ADD_PLAIN = Migration(
    "m016_add_plain",
    (
        # 1: one attempt, of which the call's own row says everything; it has no row in attempts
        "ALTER TABLE calls ADD COLUMN plain INTEGER NOT NULL DEFAULT 0",
    ),
)

M017_ADD_CANDIDATES = Migration(
    "m017_add_candidates",
    tuple(
        f"ALTER TABLE {table} ADD COLUMN {column}"
        for table in ("routes", "route_history")
        for column in (
            "candidate TEXT NOT NULL DEFAULT ''",
            "share REAL NOT NULL DEFAULT 0",
            "origin INTEGER NOT NULL DEFAULT 0",
        )
    ),
)

M018_ADD_DEADLINES = Migration(
    "m018_add_deadlines",
    (
        *(
            f"ALTER TABLE {table} ADD COLUMN deadline REAL NOT NULL DEFAULT 0"
            for table in ("routes", "route_history")
        ),
        # tasks that were under way when a share grew, as digests of eight bytes one behind the other
        "CREATE TABLE staying (alias TEXT PRIMARY KEY, version INTEGER NOT NULL, tasks BLOB NOT NULL)",
    ),
)

M019_ADD_CACHE_DETAILS = Migration(
    "m019_add_cache_details",
    (
        # sound out of a cache and writes that are kept for an hour have prices of their own
        "ALTER TABLE calls ADD COLUMN cached_audio_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE calls ADD COLUMN cache_write_1h_tokens INTEGER NOT NULL DEFAULT 0",
    ),
)

M020_CREATE_BUNDLES = Migration(
    "m020_create_bundles",
    (
        # many texts deflated together; those of a bundle have no rows of their own in blobs
        "CREATE TABLE bundles (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, leaves INTEGER NOT NULL, "
        "data BLOB NOT NULL)",
        # texts kept so far stay where they are: an empty bundle says up to where
        "INSERT INTO bundles SELECT MAX(id), MAX(id), 0, CAST('' AS BLOB) FROM blobs HAVING COUNT(*) > 0",
        "CREATE TABLE links (parent INTEGER NOT NULL, blob INTEGER NOT NULL, PRIMARY KEY (parent, blob)) "
        "WITHOUT ROWID",
        "INSERT INTO links SELECT parent, id FROM blobs WHERE parent > 0",
        # an answer is found with the conversation it ends, not by an index of its own
        "ALTER TABLE digests ADD COLUMN answer INTEGER NOT NULL DEFAULT 0",
        "UPDATE digests SET answer = "
        "COALESCE((SELECT MAX(id) FROM blobs WHERE blobs.parent = -digests.blob), 0)",
        "DROP INDEX blobs_by_parent",
    ),
)

M021_ADD_FORM = Migration(
    "m021_add_form",
    (
        # the vendor's form that a request was translated into; empty where it was sent as it came
        "ALTER TABLE attempts ADD COLUMN form TEXT NOT NULL DEFAULT ''",
    ),
)

M022_CREATE_LOOKS = Migration(
    "m022_create_looks",
    (
        # what whoever takes a trial through its course saw last; made anew at every look
        "CREATE TABLE looks (alias TEXT PRIMARY KEY, at REAL NOT NULL, seen TEXT NOT NULL)",
    ),
)

M023_CREATE_FINGERPRINTS = Migration(
    "m023_create_fingerprints",
    (
        # of calls kept so far nothing is known: their texts would have to be opened
        """
        CREATE TABLE fingerprints (
            target TEXT NOT NULL,
            answered_by TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            calls INTEGER NOT NULL,
            first_at REAL NOT NULL,
            last_at REAL NOT NULL,
            PRIMARY KEY (target, answered_by, fingerprint)
        ) WITHOUT ROWID
        """,
    ),
)

M024_ADD_PARAMETERS = Migration(
    "m024_add_parameters",
    (
        # NULL: not known, as of every call kept so far
        "ALTER TABLE calls ADD COLUMN parameters TEXT",
    ),
)

M025_CREATE_DAYS = Migration(
    "m025_create_days",
    (
        # a month of a dozen aliases is 20,000 hours: pages that show days and weeks read these instead
        """
        CREATE TABLE days (
            day INTEGER NOT NULL,
            alias TEXT NOT NULL,
            target TEXT NOT NULL,
            calls INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            priced INTEGER NOT NULL,
            prompt_tokens REAL NOT NULL,
            completion_tokens REAL NOT NULL,
            cached_tokens REAL NOT NULL,
            cost_usd REAL NOT NULL,
            total_s REAL NOT NULL,
            PRIMARY KEY (day, alias, target)
        ) WITHOUT ROWID
        """,
        # dividing integers cuts towards zero in both; taking one off where there is a rest below it floors
        """
        INSERT INTO days
        SELECT
            hour / 24 - CASE WHEN hour / 24 * 24 > hour THEN 1 ELSE 0 END, alias, target, SUM(calls),
            SUM(failed), SUM(priced), SUM(prompt_tokens), SUM(completion_tokens), SUM(cached_tokens),
            SUM(cost_usd), SUM(total_s)
        FROM hours GROUP BY 1, 2, 3
        """,
    ),
)

_KIND = (
    "target, answered_by, route, stream, usage_estimated, finish_reason, caller, price_date, price_source, "
    "modalities, features, parameters, plain"
)
_OWN = (
    "key, at, alias, status, prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, "
    "audio_tokens, output_audio_tokens, cache_write_tokens, cached_audio_tokens, "
    "cache_write_1h_tokens, ttft_s, total_s, task_id, tags, cost_usd, prompt_hash, max_tokens, "
    "frame, messages, response"
)

M026_CREATE_KINDS = Migration(
    "m026_create_kinds",
    (
        # what thousands of calls have in common is written once: half of a call's row was that
        """
        CREATE TABLE kinds (
            id INTEGER PRIMARY KEY,
            target TEXT NOT NULL,
            answered_by TEXT NOT NULL,
            route TEXT NOT NULL,
            stream INTEGER NOT NULL,
            usage_estimated INTEGER NOT NULL,
            finish_reason TEXT NOT NULL,
            caller TEXT NOT NULL,
            price_date TEXT NOT NULL,
            price_source TEXT NOT NULL,
            modalities TEXT NOT NULL,
            features TEXT NOT NULL,
            parameters TEXT,
            plain INTEGER NOT NULL
        )
        """,
        "CREATE INDEX kinds_by_target ON kinds (target, answered_by)",
        f"INSERT INTO kinds (id, {_KIND}) "  # noqa: S608 literals
        f"SELECT ROW_NUMBER() OVER (), {_KIND} FROM (SELECT DISTINCT {_KIND} FROM calls) AS seen",
        "ALTER TABLE calls RENAME TO calls_before",
        "DROP INDEX calls_by_alias",
        "DROP INDEX calls_failed",
        "DROP INDEX calls_failed_by_alias",
        "DROP INDEX calls_by_task",
        """
        CREATE TABLE calls (
            key TEXT PRIMARY KEY,
            at REAL NOT NULL,
            alias TEXT NOT NULL,
            kind INTEGER NOT NULL,
            status INTEGER NOT NULL,
            prompt_tokens INTEGER,
            completion_tokens INTEGER,
            cached_tokens INTEGER,
            reasoning_tokens INTEGER,
            audio_tokens INTEGER,
            output_audio_tokens INTEGER NOT NULL,
            cache_write_tokens INTEGER NOT NULL,
            cached_audio_tokens INTEGER NOT NULL,
            cache_write_1h_tokens INTEGER NOT NULL,
            ttft_s REAL NOT NULL,
            total_s REAL NOT NULL,
            task_id TEXT NOT NULL,
            tags TEXT NOT NULL,
            cost_usd REAL,
            prompt_hash BLOB,
            max_tokens INTEGER NOT NULL,
            frame INTEGER,
            messages INTEGER,
            response INTEGER
        ) WITHOUT ROWID
        """,
        f"INSERT INTO calls ({_OWN}, kind) SELECT {_OWN}, kinds.id FROM calls_before "  # noqa: S608 literals
        "JOIN kinds ON "
        + " AND ".join(
            f"COALESCE(kinds.{name}, '-') = COALESCE(calls_before.{name}, '-')"
            if name == "parameters"
            else f"kinds.{name} = calls_before.{name}"
            for name in _KIND.split(", ")
        )
        + " ORDER BY key",
        "DROP TABLE calls_before",
        "CREATE INDEX calls_by_alias ON calls (alias, key)",
        "CREATE INDEX calls_failed ON calls (key, status) WHERE status >= 400",
        "CREATE INDEX calls_failed_by_alias ON calls (alias, key, status) WHERE status >= 400",
        "CREATE INDEX calls_by_task ON calls (task_id, key) WHERE task_id <> ''",
    ),
)


HISTORY = (
    M001_CREATE_CALLS,
    M002_CREATE_BLOBS,
    M003_CREATE_ATTEMPTS,
    M004_CREATE_SEGMENTS,
    M005_CREATE_FEEDBACK,
    M006_CREATE_ROUTES,
    M007_CREATE_KEYS,
    M008_ADD_COST,
    M009_ADD_SHAPE,
    M010_ADD_USAGE_DETAILS,
    M011_CREATE_HOURS,
    M012_FIND_FAILURES_AND_TASKS,
    M013_FIND_FAILURES_BY_STATUS,
    M014_ADD_RETENTION,
    M015_ADD_LIMITS,
    M016_ADD_PLAIN,
    M017_ADD_CANDIDATES,
    M018_ADD_DEADLINES,
    M019_ADD_CACHE_DETAILS,
    M020_CREATE_BUNDLES,
    M021_ADD_FORM,
    M022_CREATE_LOOKS,
    M023_CREATE_FINGERPRINTS,
    M024_ADD_PARAMETERS,
    M025_CREATE_DAYS,
    M026_CREATE_KINDS,
)


def migrate(database: Database, upto: int = len(HISTORY)) -> int:
    """Apply what is missing, all in one transaction; returns the schema's version.

    ``upto`` stops early: how tests write a store as an older version left it. Raises StoreError for a schema
    newer than this program and for a database that holds somebody else's tables.
    """
    if (version := schema_version(database)) == upto:
        return version
    with database.transaction(durable=True):
        version = schema_version(database)  # again: another process may have been first
        _refuse_newer(database, version)
        if version == 0:
            _refuse_foreign(database)
            database.execute(
                "CREATE TABLE schema_history (version INTEGER PRIMARY KEY, name TEXT NOT NULL, "
                "applied_at REAL NOT NULL)"
            )
        for number, step in enumerate(HISTORY[version:upto], start=version + 1):
            for statement in step.statements:
                database.execute(statement)
            database.execute("INSERT INTO schema_history VALUES (?, ?, ?)", (number, step.name, time.time()))
    return max(version, upto)


def schema_version(database: Database) -> int:
    """Number of the last step applied; 0 for an empty database."""
    if "schema_history" not in database.tables():
        return 0
    return int(database.query("SELECT MAX(version) FROM schema_history")[0][0])


def _refuse_newer(database: Database, version: int) -> None:
    if version > len(HISTORY):
        raise StoreError(
            f"{database.name} has schema version {version}, written by a newer Understudy",
            expected=f"version {len(HISTORY)} or older",
            next_step="pip install --upgrade understudy, or point [store] url elsewhere",
        )


def _refuse_foreign(database: Database) -> None:
    foreign = sorted(database.tables() & {"calls", "blobs", "routes", "keys", "feedback", "segments"})
    if foreign:
        raise StoreError(
            f"{database.name} already holds tables that are not ours: {', '.join(foreign)}",
            expected="an empty database, or one made by Understudy",
            next_step="point [store] url in understudy.toml elsewhere",
        )
