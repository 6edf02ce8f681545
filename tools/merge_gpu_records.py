#!/usr/bin/env python3
"""Makes one record of those that the shards of a run of the GPU tests left (GTEST_TOTAL_SHARDS, GTEST_SHARD_INDEX; each with --record).

The record is verified where the shards are of the same sources and device and passed all tests between them.
"""

import argparse
import json
import sys
from pathlib import Path


def merge(records: list[dict]) -> dict:
    """One record of all; raises ValueError where they do not belong together."""
    for key in ("source_hash", "device"):
        if len({record[key] for record in records}) != 1:
            raise ValueError(f"{key}: the records differ: {sorted({record[key] for record in records})}")
    if len({record["tests"]["of"] for record in records}) != 1:
        raise ValueError("tests: the records are of programs with different numbers of tests")
    tests = {key: sum(record["tests"][key] for record in records) for key in ("passed", "failed", "skipped")}
    tests["of"] = records[0]["tests"]["of"]
    if sum(tests[key] for key in ("passed", "failed", "skipped")) > tests["of"]:
        raise ValueError(f"tests: more than the {tests['of']} that there are; is a shard named twice?")
    errors: dict[str, float] = {}
    for record in records:
        for name, error in record["worst_errors"].items():
            # A string is a NaN or an infinity, which stays for the check to refuse.
            known = errors.get(name)
            if known is None or isinstance(error, str) or (not isinstance(known, str) and error > known):
                errors[name] = error
    verified = bool(records[0]["device"]) and tests["passed"] == tests["of"]
    merged = {"source_hash": records[0]["source_hash"], "verified": verified}
    if not verified:
        merged["reason"] = "not every test ran and passed"
    date = max(record["date"] for record in records)
    return merged | {"device": records[0]["device"], "date": date, "tests": tests, "worst_errors": dict(sorted(errors.items()))}


def main() -> int:
    parser = argparse.ArgumentParser(description="Merges the records of the GPU tests' shards.")
    parser.add_argument("shards", nargs="+", type=Path, help="the shards' records")
    parser.add_argument("--out", required=True, type=Path, help="where the one record goes")
    arguments = parser.parse_args()
    try:
        merged = merge([json.loads(path.read_text()) for path in arguments.shards])
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"GPU records: {error}", file=sys.stderr)
        return 1
    arguments.out.write_text(json.dumps(merged, indent=2) + "\n")
    print(f"GPU records: {merged['tests']['passed']} of {merged['tests']['of']} tests passed")
    return 0 if merged["verified"] else 1


if __name__ == "__main__":
    sys.exit(main())
