"""`redknot show` and the pictures: figures equal the profile's and the placement's, errors are one line."""

from __future__ import annotations

import builtins
import io
import json
import re

import pytest

from redknot_hf import cli
from redknot_hf.errors import RedKnotError
from redknot_hf.heads import HeadProfile
from redknot_hf.heads.capacity import capacity
from redknot_hf.heads.plots import terminal_heatmap
from redknot_hf.placement import HeadPlacement, place_heads

NAME = "Meta-Llama-3.1-8B-Instruct"


def show(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["show", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def hybrid() -> HeadProfile:
    classes = [["global", "global"], ["local", "dense"], ["global", "global"], ["retrieval", "local"]]
    metadata = {"head_dim": 64, "attention_layers": [1, 3], "validation": {"text": {"kl": 0.01234567}, "top1": 0.99}}
    return HeadProfile(4, 2, classes, 4, 1000, metadata)


# ---------------------------------------------------------------- command


def test_json_figures_are_those_of_profile_and_placement(capsys):
    profile = HeadProfile.load(NAME)
    status, out, _ = show(capsys, NAME, "--seq-len", "16k", "--batch", 2, "--dtype", "float32", "--page-size", 32,
                          "--world-size", 8, "--json")  # fmt: skip
    report = json.loads(out)
    assert status == 0 and report["seq_len"] == 16384
    assert report["memory"]["pages"] == profile.kv_bytes(16384, 2, "float32", 32)
    assert report["memory"]["dense"] == profile.dense_kv_bytes(16384, 2, "float32")
    assert report["memory"]["tables"] == profile.table_bytes(16384, 2, 32)
    assert report["classes"] == {"global": 128, "local": 128, "retrieval": 0, "dense": 0}
    assert sum((r["last"] - r["first"] + 1) * r["global"] for r in report["layers"]) == 128
    before = HeadPlacement.contiguous(profile, 8)
    assert report["placement"]["before"]["imbalance"] == before.imbalance(16384, 32)
    after = place_heads(profile, 8, page_size=32).kv_bytes_per_rank(16384, 2, "float32", 32)
    assert report["placement"]["after"]["bytes_per_rank"] == after
    assert report["placement"]["after"]["imbalance"] < 1.05 < report["placement"]["before"]["imbalance"]


def test_capacity_counts_whole_sessions(capsys):
    profile = HeadProfile.load(NAME)
    status, out, _ = show(
        capsys, NAME, "--gpu-memory", "80GiB", "--weights-bytes", "16GB", "--context", "128k", "--json"
    )
    found = json.loads(out)["capacity"]
    left = 80 * 2**30 - 16 * 10**9 - 2**30
    each = profile.kv_bytes(131072) + profile.table_bytes(131072)
    assert status == 0 and found["available"] == left
    activations = 16 * 10**9 // 50
    assert [found[name] for name in ("weights", "runtime", "activations")] == [16 * 10**9, 2**30, activations]
    assert found["head_aware_bytes"] == each and found["fixed"] == (left - activations) // each
    assert found["dense_bytes"] == 32 * 8 * 131072 * 128 * 2 * 2
    for kind, rest in (("dense", "dense"), ("paged", "paged"), ("head_aware", "head_aware")):
        assert found[kind] == left // (
            found[f"{rest}_bytes"] + found[f"{kind}_extra"]
        )  # growing takes more than a forward
    assert found["separate"] == (left - activations) // (each + found["separate_extra"])
    assert found["head_aware"] >= 1.9 * found["paged"]
    status, out, _ = show(capsys, NAME, "--gpu-memory", "80GiB", "--weights-bytes", "16GB", "--context", "128k")
    assert "assumed: weights 14.9 GiB: given by --weights-bytes" in out and re.search(
        rf"max_cache_len +{(left - activations) // each} ", out
    )
    assert "runtime 1.0 GiB taken" in out and "activations 305.2 MiB" in out
    status, out, _ = show(
        capsys, NAME, "--gpu-memory", "80GiB", "--weights-bytes", "16GB", "--reserve", "3GiB", "--utilization", "0.5", "--json"
    )  # fmt: skip
    assert json.loads(out)["capacity"]["available"] == 37 * 2**30 - 16 * 10**9


def test_capacity_over_ranks_is_decided_by_the_fullest_one():
    profile = HeadProfile.load(NAME)
    found = capacity(profile, 32768, 80 * 2**30, 16 * 10**9, world_size=8)
    fullest = max(place_heads(profile, 8).kv_bytes_per_rank(32768))
    assert found.head_aware_bytes == fullest + round(profile.table_bytes(32768) / 8)
    assert found.dense_bytes == profile.dense_kv_bytes(32768) // 8
    with pytest.raises(RedKnotError, match="do not fit"):
        capacity(profile, 100, 2**30, 2**31)


def test_text_shows_table_map_provenance_and_validation(capsys, tmp_path):
    path = hybrid().save(tmp_path / "p.json")
    status, out, err = show(capsys, path)
    assert status == 0 and not err and "\x1b" not in out
    assert re.search(r"^  1 +0 +0 +1 +1 +4 +1000 ", out, re.M) and "no KV in this layer" in out
    assert "kl: 0.01235" in out and "top1: 0.99" in out
    status, out, _ = show(capsys, NAME)
    assert "mit-han-lab/duo-attention" in out and "scores kept: gate" in out


def test_strangers_metadata_cannot_control_the_terminal(capsys, tmp_path):
    profile = hybrid()
    profile.metadata.update(model="\x1b[2Jowned\r\n", notes="a\x07b", validation={"\x1b]0;x": "\x9b"})
    _, out, _ = show(capsys, profile.save(tmp_path / "p.json"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)


def test_list_and_foreign_maps(capsys, tmp_path):
    status, out, _ = show(capsys)
    assert status == 0 and NAME in out
    assert NAME in {row["name"] for row in json.loads(show(capsys, "--json")[1])}
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({f"{l}-{h}": [l * h] for l in range(4) for h in range(4)}))
    saved, plot = tmp_path / "own.json", tmp_path / "map.svg"
    status, out, _ = show(capsys, scores, "--num-kv-heads", 2, "--fraction", 0.5, "--save", saved, "--plot", plot)
    assert status == 0 and HeadProfile.load(saved).count("global") == 4 and plot.read_text().startswith("<?xml")
    assert "head_dim" in out and "8" in json.dumps(
        json.loads(show(capsys, saved, "--head-dim", 8, "--json")[1])["memory"]
    )
    rows = {"num_kv_heads": 1, "head_map": [[True, False]] * 6}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = show(capsys, tmp_path / "rows.json", "--attention-layers", "1:6:2", "--json")[1]
    assert json.loads(out)["attention_layers"] == [1, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "no head profile 'missing.json'"),
        ([NAME, "--num-kv-heads", "2"], "--num-kv-heads is for head maps of other projects"),
        ([NAME, "--world-size", "3"], "world_size is 3"),
        ([NAME, "--dtype", "float12"], "dtype is 'float12'"),
        ([NAME, "--gpu-memory", "80GiB"], "pass --model ID or --weights-bytes"),
        ([NAME, "--gpu-memory", "1GiB", "--weights-bytes", "2GiB"], "do not fit"),
        ([NAME, "--gpu-memory", "1GiB", "--weights-bytes", "1", "--utilization", "2"], "utilization is 2.0"),
        ([NAME, "--model", "/nowhere/at/all"], "no config for the model"),
        ([NAME, "--plot", "map.gif"], "must end in .png"),
        ([NAME, "--format", "redknot"], "no such file"),
        ([NAME, "--attention-layers", "x"], "--attention-layers is 'x'"),
    ],
)
def test_mistakes_give_one_line_and_status_2(capsys, arguments, message):
    status, out, err = show(capsys, *arguments)
    assert status == 2 and not out
    assert message in err and err.startswith("redknot: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--seq-len", "0"], ["--seq-len", "1e3"], ["--gpu-memory", "80XB"], ["--gpu-memory", "0"]]
)
def test_bad_numbers_name_the_option(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["show", NAME, *arguments])
    assert exit.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_model_checks_the_shape_and_counts_parameters(capsys, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, dtype="bfloat16", tie_word_embeddings=True)  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    profile = HeadProfile.uniform(config, window=64).save(tmp_path / "p.json")
    status, out, _ = show(capsys, profile, "--model", tmp_path / "model", "--gpu-memory", "2GiB", "--json")
    attention, mlp, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96, 2 * 64
    assert json.loads(out)["capacity"]["weights"] == 2 * (128 * 64 + 2 * (attention + mlp + norms) + 64)
    status, _, err = show(capsys, NAME, "--model", tmp_path / "model")
    assert status == 2 and "32 layers x 8 KV heads" in err and "2 layers x 2 KV heads" in err


# ---------------------------------------------------------------- pictures


def cells(text: str, head: int) -> str:
    return "".join(line.split(" ", 1)[1] if line.startswith("H") else line[5:] for line in text.splitlines()
                   if line.strip().startswith(f"H{head} "))  # fmt: skip


def test_terminal_map_has_one_cell_per_head():
    profile = HeadProfile.load(NAME)
    text = terminal_heatmap(profile, width=80, color=False, unicode=True)
    for head in range(8):
        expected = "".join("█" if row[head] == "global" else "░" for row in profile.head_class)
        assert cells(text, head) == expected
    folded = terminal_heatmap(profile, width=20, color=False, unicode=False)
    assert max(map(len, folded.splitlines()[:-1])) <= 20
    assert cells(folded, 0) == "".join("#" if row[0] == "global" else "-" for row in profile.head_class).replace(
        "-", "."
    )


def test_terminal_map_shades_by_kept_share_and_blanks_other_layers():
    profile = HeadProfile(
        3, 1, [["local"], ["local"], ["local"]], 0, [[100], [500], [900]], {"attention_layers": [0, 1, 2]}
    )
    assert cells(terminal_heatmap(profile, seq_len=1000, unicode=True, color=False), 0) == "░▒▓"
    profile.metadata["attention_layers"] = [0, 2]
    assert cells(terminal_heatmap(profile, seq_len=1000, unicode=True, color=False), 0) == "░ ▓"


def test_colour_only_on_terminals_that_want_it(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    profile = hybrid()
    assert "\x1b[" in terminal_heatmap(profile, stream=Terminal())
    assert "\x1b[" not in terminal_heatmap(profile, stream=io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in terminal_heatmap(profile, stream=Terminal())
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    terminal_heatmap(profile, stream=latin).encode("latin-1")


def test_files_are_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    assert hybrid().plot(tmp_path / "a" / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in hybrid().plot(tmp_path / "1.svg").read_text()
    assert hybrid().plot(tmp_path / "1.pdf").read_bytes().startswith(b"%PDF")
    odd = hybrid()
    odd.metadata["model"] = "a$b_{"
    odd.plot(tmp_path / "2.svg")


def test_missing_matplotlib_names_the_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RedKnotError, match=r"needs matplotlib.*pip install 'redknot-hf\[plots\]'"):
        hybrid().plot(tmp_path / "m.png")


def test_a_picture_of_absurdly_many_layers_stays_small(tmp_path):
    """The file of such a profile is below the limit for profiles; its picture must not take gigabytes."""
    profile = HeadProfile(100_000, 1, [["global"]] * 100_000)
    path = profile.plot(tmp_path / "wide.png")
    with path.open("rb") as file:
        width = int.from_bytes(file.read(24)[16:20], "big")  # of a PNG's first chunk
    assert width < 8000
