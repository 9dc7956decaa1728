"""`redknot store`: what a person sees of a store."""

from __future__ import annotations

import json
import os

import pytest
from conftest import free_port
from store_backends import big_entry, make_entry, make_key

from redknot_hf.cli import main
from redknot_hf.segments.stores import SegmentStore


@pytest.fixture
def folder(tmp_path):
    store = SegmentStore(tmp_path / "s")
    for i in range(3):
        store.put(make_key(i), big_entry(i, 100_000))
        os.utime(store._path(make_key(i).hex), (1000.0 + i, 1000.0 + i))
    return tmp_path / "s"


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main(["store", *map(str, argv)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_ls_lists_the_least_recently_used_first(folder, capsys):
    status, out, _ = run(capsys, "ls", folder)
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == [make_key(i).hex for i in range(3)]
    assert "kB" in out and "1970-01-01T" in out
    status, out, _ = run(capsys, "ls", f"file://{folder}", "--json", "--limit", 1)
    assert [e["key"] for e in json.loads(out)["entries"]] == [make_key(0).hex]


def test_stat_counts(folder, capsys):
    status, out, _ = run(capsys, "stat", folder, "--json")
    report = json.loads(out)
    assert status == 0 and report["entries"] == 3 and 300_000 < report["bytes"] < 310_000
    assert (report["least_recently_used"], report["most_recently_used"]) == (1000.0, 1002.0)
    assert "entries  3" in run(capsys, "stat", folder)[1]


def test_gc_keeps_what_fits(folder, capsys):
    status, out, _ = run(capsys, "gc", folder, "--max-bytes", "250kB", "--json")
    assert status == 0 and (json.loads(out)["removed"], json.loads(out)["kept"]) == (1, 2)
    assert not SegmentStore(folder).contains(make_key(0))
    assert "removed 2 entries" in run(capsys, "gc", folder, "--older-than", "30d")[1]


def test_verify_finds_damage_and_says_so_in_its_status(folder, capsys):
    assert run(capsys, "verify", folder)[0] == 0
    path = SegmentStore(folder)._path(make_key(1).hex)
    path.write_bytes(path.read_bytes()[:-1])
    status, out, _ = run(capsys, "verify", folder, "--json")
    assert status == 1 and [b["key"] for b in json.loads(out)["bad"]] == [make_key(1).hex] and path.exists()
    assert run(capsys, "verify", folder, "--delete")[0] == 1 and not path.exists()
    assert run(capsys, "verify", folder)[0] == 0


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["ls", "/no/such/folder"], "not a directory"),
        (["ls", "file:///no/such/folder"], "not a directory"),
        (["ls", "nosuch://x"], "no store serves"),
        (["ls", "memory://"], "lives in the process"),
        (["stat", "file:///tmp", "-o", "x"], "NAME=VALUE"),
        (["stat", "file:///tmp", "-o", "x=1"], "unexpected keyword argument"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, reason, capsys):
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and len(err.strip().splitlines()) == 1 and reason in err


@pytest.mark.parametrize("argv", [["gc", "x", "--max-bytes", "many"], ["gc", "x", "--older-than", "5"], ["ls"], []])
def test_argparse_explains_the_rest(argv, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["store", *argv])
    assert exit_status.value.code == 2


@pytest.mark.store
def test_a_server_that_is_down_is_an_error_here_and_no_password_is_shown(capsys):
    pytest.importorskip("valkey")
    status, _, err = run(capsys, "stat", f"valkey://me:hunter2@127.0.0.1:{free_port()}", "--timeout", 1)
    assert status == 2 and "refused" in err and "hunter2" not in err


@pytest.mark.store
def test_a_valkey_server(valkey_server, capsys):
    url = f"valkey://127.0.0.1:{valkey_server.port}"
    with SegmentStore(url, prefix="cli") as store:
        store.put(make_key(1), make_entry(1))
    assert json.loads(run(capsys, "stat", url, "-o", "prefix=cli", "--json")[1])["entries"] == 1
    assert make_key(1).hex in run(capsys, "ls", url, "-o", "prefix=cli")[1]


@pytest.mark.store
def test_a_mooncake_pool(mooncake_pool, capsys):
    mooncake_pool.member.put(make_key(77), make_entry(1))
    options = ["-o", f"admin_port={mooncake_pool.admin_port}"]
    assert make_key(77).hex in run(capsys, "ls", mooncake_pool.url, *options)[1]
    mooncake_pool.member.delete(make_key(77))
