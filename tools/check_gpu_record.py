#!/usr/bin/env python3
"""Checks tests/gpu/record.json: do the GPU tests that it tells of vouch for the sources as they are now?

Fails where the record is malformed, names other sources, or tells of a failed test. Warns where it says itself that nothing was
verified. CI has no GPU, so the record is how it knows that the CUDA code was run (CONTRIBUTING.md tells how to make one).
"""

import argparse
import json
import math
import sys
from datetime import datetime, timezone

from gpu_source_hash import RECORD, ROOT, gpu_source_hash


def problems_of(record: object, current_hash: str) -> list[str]:
    """Every reason to refuse the record; empty when it is good."""
    if not isinstance(record, dict):
        return ["it is not a JSON object"]
    problems = []
    tests = record.get("tests")
    if not isinstance(tests, dict) or not all(type(tests.get(key)) is int for key in ("passed", "failed", "skipped")):
        return ["tests: passed, failed and skipped must be whole numbers"]
    if tests["failed"] > 0:
        problems.append(f"it tells of {tests['failed']} failed tests")
    if not isinstance(record.get("verified"), bool):
        problems.append("verified: must be true or false")
    elif record["verified"]:
        if tests["passed"] < 1 or tests["skipped"] > 0:
            problems.append("it says verified, but tests were skipped or none passed")
        if not record.get("device") or not record.get("date"):
            problems.append("it says verified, but names no device or no date")
    elif not record.get("reason"):
        problems.append("it says not verified, and gives no reason")
    errors = record.get("worst_errors")
    if not isinstance(errors, dict):
        problems.append("worst_errors: must map names to numbers")
    else:
        problems += [
            f"worst_errors: {name} is {value!r}"
            for name, value in errors.items()
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
        ]
    if record.get("source_hash") != current_hash:
        problems.append(f"it is of sources with hash {record.get('source_hash')}, the sources here have {current_hash}")
    return problems


def write_unverified(reason: str) -> None:
    """Replaces the record by one that admits that the present sources were not run."""
    record = {
        "source_hash": gpu_source_hash(),
        "verified": False,
        "reason": reason,
        "device": "",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "tests": {"passed": 0, "failed": 0, "skipped": 0},
        "worst_errors": {},
    }
    (ROOT / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Checks {RECORD} against the sources.")
    parser.add_argument("--write-unverified", metavar="REASON", help="write a record that says why nothing was verified, and stop")
    arguments = parser.parse_args()
    if arguments.write_unverified:
        write_unverified(arguments.write_unverified)
        return 0
    try:
        record = json.loads((ROOT / RECORD).read_text())
    except (OSError, ValueError) as error:
        print(f"GPU record: {RECORD}: {error}", file=sys.stderr)
        return 1
    problems = problems_of(record, gpu_source_hash())
    for problem in problems:
        print(f"GPU record: {RECORD}: {problem}", file=sys.stderr)
    if problems:
        print("GPU record: run flashdelta_gpu_tests --record=tests/gpu/record.json on a GPU, or see CONTRIBUTING.md", file=sys.stderr)
        return 1
    if record["verified"]:
        print(f"GPU record: good ({record['tests']['passed']} tests on {record['device']}, {record['date']})")
    else:
        print(f"GPU record: warning: not verified on a GPU: {record['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
