"""Bad input by the million: seeded generators of it, by damage to what is good and from scratch."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence

#: What has broken readers of text, YAML and JSON before.
NASTY = (
    *("", " ", "\t", "\n", "\r\n", "\0", "\x1b[31m", "\u202e", "\u2028", "\ufeff", "\ud800", "𝒳"),
    *("null", "~", "true", "NaN", "-Infinity", "1e999", "-0", "0x" + "f" * 40, "1:59:59", "1_0"),
    *("9" * 30, "9" * 5000, "0x" + "f" * 4000, "-1", "2147483648", "1.0000000000000001", ".inf"),
    *("&a ", "*a", "<<: *recipe", "&r [*r]", "!!int ''", "!!bool x", "!!timestamp x", "!!set {a}"),
    *("!!python/object/apply:os.system ['false']", "!!python/name:os.system", "!!binary '?'"),
    *(
        "{",
        "}",
        "[",
        "]",
        "[" * 300,
        "{a: " * 300,
        "'",
        '"',
        "|\n",
        "? ",
        "- ",
        ": ",
        "#",
        "%YAML 9",
    ),
    *("../", "..", "/etc/passwd", "a/../../b", "\\", "C:\\x", "~/x", ".", "%2e%2e%2f", "file:///x"),
    *("$(false)", "`false`", "{source!r}", "{seed:>999999999}", "{0.__class__}", "*" * 50, "[!a-"),
)
PRIOR_KEY = "villain / persona_cot / no-cot / librarian / 42"


def damaged(text: str, rng: random.Random) -> str:
    """``text`` after one to four edits: of characters, of lines, of tokens, by nasty pieces."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(7):
            case 0:
                text = text[:at] + rng.choice(NASTY) + text[at:]
            case 1:
                text = text[:at] + text[at + rng.randint(1, 8) :]
            case 2:
                text = text[:at] + chr(rng.randrange(0x250)) + text[at + 1 :]
            case 3:
                lines = text.split("\n")
                lines[rng.randrange(len(lines))] = rng.choice(NASTY)
                text = "\n".join(lines)
            case 4:
                lines = text.split("\n")
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                text = "\n".join(lines)
            case 5:  # what a field says, instead of how it is written
                lines = text.split("\n")
                i = rng.randrange(len(lines))
                lines[i] = f"{lines[i].partition(':')[0]}: {rng.choice(NASTY)}"
                text = "\n".join(lines)
            case 6:
                text = text[:at]
    return text


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bytes after a few flips, a cut, or a piece doubled."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        if found:
            found[rng.randrange(len(found))] = rng.randrange(256)
    at = rng.randrange(len(found) + 1)
    match rng.randrange(4):
        case 0:
            return bytes(found[:at])
        case 1:
            return bytes(found[:at] + found[at // 2 :])
    return bytes(found)


def text(rng: random.Random, longest: int = 40) -> str:
    """Any text, surrogates too; nasty pieces are frequent."""
    if rng.random() < 0.5:
        return "".join(rng.choice(NASTY) for _ in range(rng.randint(1, 3)))
    return "".join(chr(rng.randrange(0x11000)) for _ in range(rng.randint(0, longest)))


def value(rng: random.Random, depth: int = 3) -> object:
    """Any JSON value."""
    kind = rng.randrange(9 if depth else 6)
    if kind >= 6:
        below = [value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
        return {text(rng, 6): v for v in below} if kind > 6 else below
    return (
        None,
        rng.random() < 0.5,
        rng.randrange(-(2**70), 2**70),
        rng.choice([0.5, -1.0, 1e308, float("nan"), float("inf"), 10**400, -1, 0, 1, 3]),
        text(rng),
        rng.choice(["A", "B", "F32", "dtype", "LORA", "q_proj", "1", "stop"]),
    )[kind]


def edited(good: object, rng: random.Random) -> object:
    """A JSON value with one thing in it exchanged, dropped, doubled or renamed."""
    if isinstance(good, dict) and good and rng.random() < 0.9:
        name = rng.choice(list(good))
        found = dict(good)
        match rng.randrange(6):
            case 0:
                del found[name]
            case 1:
                found[text(rng, 8)] = found.pop(name)
            case 2:
                found[text(rng, 8)] = value(rng, 1)
            case _:
                found[name] = edited(found[name], rng)
        return found
    if isinstance(good, list) and good and rng.random() < 0.8:
        i, found = rng.randrange(len(good)), list(good)
        match rng.randrange(4):
            case 0:
                del found[i]
            case 1:
                found.insert(i, found[i])
            case _:
                found[i] = edited(found[i], rng)
        return found
    return value(rng, 2)


def json_text(good: object, rng: random.Random) -> str:
    """JSON of a value edited once or twice; at times damaged as text too, at times as it was."""
    for _ in range(rng.randrange(3)):
        good = edited(good, rng)
    written = json.dumps(good, ensure_ascii=rng.random() < 0.5)
    return damaged(written, rng) if rng.random() < 0.2 else written


def safetensors(rng: random.Random) -> bytes:
    """A file of that format, more or less: its header edited, its length another, its data cut."""
    tensors, end = {}, 0
    for name in ("base_model.model.q_proj.lora_A.weight", "b", "c")[: rng.randint(1, 3)]:
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        size = 4
        for n in shape:
            size *= n
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json_text({"__metadata__": {"format": "pt"}, **tensors}, rng)
    head = header.encode("utf-8", "surrogatepass")
    length = len(head) if rng.random() < 0.9 else rng.choice([0, 7, 2**31, 2**63, 2**64 - 1])
    data = (
        struct.pack("<Q", length) + head + bytes(end if rng.random() < 0.8 else rng.randrange(99))
    )
    return flipped(data, rng) if rng.random() < 0.2 else data


_FUNCTIONS = (
    *("read_csv", "read_csv_auto", "read_parquet", "parquet_scan", "parquet_metadata", "read_json"),
    *("read_text", "read_blob", "glob", "sniff_csv", "read_ndjson", "read_json_objects", "getenv"),
    *("parquet_schema", "parquet_file_metadata", "parquet_kv_metadata", "query_table", "query"),
    *("read_duckdb", "sqlite_scan", "postgres_scan", "mysql_scan", "arrow_scan", "pandas_scan"),
    *("iceberg_scan", "delta_scan", "st_read", "read_xlsx", "which_secret", "pragma_table_info"),
)
_STATEMENTS = (
    *("COPY ({q}) TO '{t}'", "COPY numbers TO '{t}' (FORMAT parquet)", "COPY numbers FROM '{s}'"),
    *("EXPORT DATABASE '{t}'", "IMPORT DATABASE '{s}'", "ATTACH '{t}' AS x", "ATTACH '{s}' AS x"),
    *("ATTACH '{t}' AS x (TYPE sqlite)", "ATTACH 'http://127.0.0.1:9/x.db' AS x", "INSTALL httpfs"),
    *("FORCE INSTALL sqlite FROM '{s}'", "LOAD '{s}'", "LOAD sqlite", "UPDATE EXTENSIONS"),
    *("SET enable_external_access = true", "RESET enable_external_access", "RESET ALL"),
    *("SET GLOBAL lock_configuration = false", "PRAGMA lock_configuration = false"),
    *("SET temp_directory = '{t}'", "SET home_directory = '{t}'", "SET secret_directory = '{t}'"),
    *("SET allowed_directories = ['/']", "SET allowed_paths = ['{s}']", "SET file_search_path='/'"),
    *("SET extension_directory = '{t}'", "SET custom_extension_repository = '{t}'"),
    *("SET allow_unsigned_extensions = true", "SET python_enable_replacements = true"),
    *(
        "PRAGMA enable_profiling = 'json'",
        "SET profiling_output = '{t}'",
        "PRAGMA log_query_path='{t}'",
    ),
    *("SET log_query_path = '{t}'", "CALL enable_logging(storage = 'file', storage_path = '{t}')"),
    *(
        "CALL enable_profiling(save_location = '{t}')",
        "CREATE SECRET (TYPE http, BEARER_TOKEN 'x')",
    ),
    *("CREATE PERSISTENT SECRET p (TYPE s3, KEY_ID 'x', SECRET 'y')", "FROM duckdb_secrets()"),
    *(
        "CREATE TABLE x AS {q}",
        "CREATE TEMP TABLE x AS {q}",
        "CREATE VIEW x AS {q}",
        "DROP TABLE study",
    ),
    *("CREATE OR REPLACE TABLE numbers AS {q}", "DELETE FROM outcomes", "TRUNCATE outcomes"),
    *(
        "INSERT INTO numbers FROM numbers",
        "UPDATE study SET title = 'x'",
        "ALTER TABLE study ADD y INT",
    ),
    *(
        "CREATE TEMP MACRO m() AS TABLE {q}",
        "PREPARE p AS {q}",
        "EXPLAIN ANALYZE {q}",
        "DESCRIBE {q}",
    ),
    *(
        "SUMMARIZE {q}",
        "BEGIN; DROP TABLE numbers; COMMIT",
        "FORCE CHECKPOINT",
        "VACUUM",
        "DETACH w",
    ),
    *(
        "USE x",
        "CREATE SCHEMA x",
        "COMMENT ON TABLE study IS 'x'",
        "{q}; {q}",
        "PIVOT ({q}) ON ALL",
    ),
    *(
        "SELECT getenv('CANARY')",
        "SELECT current_setting('secret_directory')",
        "FROM duckdb_settings()",
    ),
    *("FROM '{s}'", 'FROM "{s}"', "SELECT error(rationale) FROM outcomes", "SELECT '{s}'::INT"),
    *("SELECT rationale::INT FROM outcomes", "SELECT DATE '294000-01-01'", "FROM test_all_types()"),
)


def sql(rng: random.Random, secret: str, target: str) -> str:
    """A query: the warehouse's own, or one that would read ``secret`` or write ``target``.

    The published ways around DuckDB's read-only mode and its external access, alone, within each
    other, in comments, quotes and other case, and damaged.
    """
    query = rng.choice(("SELECT 1", "FROM numbers", "FROM study", "SELECT count(*) FROM outcomes"))
    if rng.random() < 0.5:
        query = (
            f"SELECT * FROM {rng.choice(_FUNCTIONS)}('{rng.choice((secret, target, '/etc/*'))}')"
        )
    if rng.random() < 0.6:
        q, s, t = query, secret, target
        query = rng.choice(_STATEMENTS).replace("{q}", q).replace("{s}", s).replace("{t}", t)
    if rng.random() < 0.15:
        query = rng.choice(("SELECT 1; ", "/* x */ ", "-- x\n", "WITH a AS (SELECT 1) ")) + query
    if rng.random() < 0.1:
        query = f"SELECT * FROM query($${query}$$)"
    if rng.random() < 0.1:
        query = query.swapcase() if secret not in query and target not in query else query
    return damaged(query, rng) if rng.random() < 0.3 else query


def pick(rng: random.Random, good: Sequence[str]) -> str:
    """A name: one of the good ones damaged, or anything; now and then as it is."""
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(good)
    return damaged(rng.choice(good), rng) if kind < 0.6 else text(rng)
