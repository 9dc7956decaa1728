"""`redknot store ls|stat|gc|verify URL`: look after a segment store from the shell.

It reads and removes; nothing is ever written into a store. Credentials in the URL are not printed. A store that does
not answer is an error here (status 2), while a prompt would go on without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RedKnotError, shorten

if TYPE_CHECKING:
    from ..segments.stores import SegmentStore

NAME = "store"
HELP = "list, measure, clean and check a store of segments"
DESCRIPTION = """\
Look after a store of segments (documents whose keys and values were computed once).

URL is file:///directory (or just a path), s3://bucket/prefix or another fsspec URL, valkey://host:port or
mooncake://host:port. Set REDKNOT_STORE_SECRET where entries are sealed with a secret.
"""
EPILOG = """\
examples:
  redknot store ls file:///var/cache/segments
  redknot store stat valkey://cache.local:6379 --json
  redknot store gc /var/cache/segments --max-bytes 50GB --older-than 30d
  redknot store verify s3://bucket/segments --delete
  redknot store ls mooncake://master:50051 -o admin_port=9003

Exit status of verify: 1 if an entry is damaged.
"""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("url", metavar="URL", help="the store, e.g. file:///var/cache/segments")
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--timeout", type=_positive, metavar="S", help="seconds to wait for an answer")
    common.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of this kind of store, e.g. prefix=mine or admin_port=9003",
    )  # fmt: skip

    ls = actions.add_parser("ls", parents=[common], help="one line per entry, least recently used first")
    ls.add_argument("--limit", type=int, metavar="N", help="only the N least recently used")
    actions.add_parser("stat", parents=[common], help="number of entries and bytes")
    gc = actions.add_parser("gc", parents=[common], help="remove leftovers, old entries, and what is over a ceiling")
    gc.add_argument("--max-bytes", type=_bytes, metavar="SIZE", help="keep at most this much, e.g. 50GB or 50GiB")
    gc.add_argument("--older-than", type=_duration, metavar="TIME", help="remove what was unused for e.g. 12h or 30d")
    verify = actions.add_parser("verify", parents=[common], help="read every entry and check it")
    verify.add_argument("--delete", action="store_true", help="remove the damaged ones")


def run(args: argparse.Namespace) -> int:
    with _open(args) as store:
        return {"ls": _ls, "stat": _stat, "gc": _gc, "verify": _verify}[args.action](store, args)


def _open(args: argparse.Namespace) -> SegmentStore:
    from ..segments.stores import SegmentStore

    options: dict[str, Any] = {"timeout": args.timeout}
    if args.url.startswith("memory:"):
        raise RedKnotError("url: a memory store lives in the process that made it; it cannot be seen from here")
    if args.url.startswith("mooncake://"):
        # A pool that keeps entries in the memory of a command that is about to end would lose them.
        options["segment_bytes"] = 0
        options["buffer_bytes"] = 256 << 20
    target: Any = args.url if "://" in args.url else Path(args.url)
    if isinstance(target, Path) or args.url.startswith("file://"):
        options["create"] = False
    for text in args.option:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise RedKnotError(f"--option must be NAME=VALUE, got {shorten(text)}")
        options[name] = _value(value)
    try:
        return SegmentStore(target, **options)
    except TypeError as e:
        raise RedKnotError(f"--option: {e}") from None


def _ls(store: SegmentStore, args: argparse.Namespace) -> int:
    records = store.list()[: args.limit]
    if args.json:
        print(json.dumps({"url": store.url, "entries": [dataclasses.asdict(r) for r in records]}, indent=2))
        return 0
    for record in records:
        print(f"{record.key}  {_size(record.nbytes):>10}  {_when(record.last_used)}")
    return 0


def _stat(store: SegmentStore, args: argparse.Namespace) -> int:
    records = store.list()
    report = {
        "url": store.url,
        "kind": store.tier,
        "entries": len(records),
        "bytes": sum(r.nbytes for r in records),
        "largest_bytes": max((r.nbytes for r in records), default=0),
        "least_recently_used": records[0].last_used if records else None,
        "most_recently_used": records[-1].last_used if records else None,
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{report['url']} ({report['kind']})")
    print(f"  entries  {len(records)}")
    print(f"  bytes    {_size(report['bytes'])}, the largest entry {_size(report['largest_bytes'])}")
    if records:
        print(f"  used     between {_when(records[0].last_used)} and {_when(records[-1].last_used)}")
    return 0


def _gc(store: SegmentStore, args: argparse.Namespace) -> int:
    report = store.gc(max_bytes=args.max_bytes, older_than=args.older_than)
    if args.json:
        print(json.dumps({"url": store.url, **dataclasses.asdict(report)}, indent=2))
    else:
        print(
            f"removed {report.removed} entries and {report.leftovers} leftovers, {_size(report.freed_bytes)}; "
            f"kept {report.kept} entries, {_size(report.kept_bytes)}"
        )
    return 0


def _verify(store: SegmentStore, args: argparse.Namespace) -> int:
    from tqdm import tqdm

    checked, bad = 0, []
    total = len(store.list())
    # stderr, and only for a person: pipes get the result alone.
    for record, problem in tqdm(
        store.verify(delete=args.delete), total=total, unit="entry", disable=not sys.stderr.isatty()
    ):
        checked += 1
        if problem is not None and problem != "vanished":
            bad.append({"key": record.key, "nbytes": record.nbytes, "problem": problem})
    if args.json:
        print(json.dumps({"url": store.url, "checked": checked, "bad": bad, "deleted": args.delete}, indent=2))
    else:
        for item in bad:
            print(f"{item['key']}  {item['problem']}")
        print(f"{checked} entries checked, {len(bad)} bad{' and deleted where damaged' if bad and args.delete else ''}")
    return 1 if bad else 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 500MB or 50GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write e.g. 90s, 12h or 30d")
    return float(match[1]) * _SECONDS[match[2]]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _size(nbytes: Any) -> str:
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def _when(seconds: float) -> str:
    if not seconds:
        return "unknown"
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
