"""Which rows pass, against a definition in plain Python; schedules and parameter files."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from redknot_hf.errors import RedKnotError
from redknot_hf.sparse_ffn import Band, SparseFFNSchedule
from redknot_hf.sparse_ffn.selection import select_rows


def passing(scores: list[float], always: list[bool], real: list[bool], rule: Band, bucket: int) -> set[int]:
    """The rows of one sequence that pass, by definition."""
    fixed = {i for i in range(len(scores)) if always[i] and real[i]}
    free = [i for i in range(len(scores)) if real[i] and not always[i]]
    free.sort(key=lambda i: (-scores[i], i))
    total = sum(real)
    if rule.keep is not None:
        count = math.ceil(rule.keep * total) - len(fixed)
    elif rule.mass is not None:
        target, count, covered = rule.mass * sum(scores[i] for i in free), 0, 0.0
        while covered < target:
            covered += scores[free[count]]
            count += 1
    else:
        mean = sum(score for score, r in zip(scores, real, strict=True) if r) / max(total, 1)
        count = sum(scores[i] >= rule.above_mean * mean for i in free)
    count = max(count, 0) + len(fixed)
    count = min(-(-count // bucket) * bucket, total) - len(fixed)
    return fixed | set(free[: max(count, 0)])


RULES = [
    Band(0, mass=0.5),
    Band(0, mass=0.9),
    Band(0, mass=0.0),
    Band(0, keep=0.0),
    Band(0, keep=0.3),
    Band(0, keep=0.75),
    Band(0, above_mean=0.5),
    Band(0, above_mean=2.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_those_of_the_definition(rule, padded):
    rng = random.Random(f"{rule}{padded}")
    for _ in range(40):
        batch, rows, bucket = rng.randint(1, 3), rng.randint(1, 40), rng.choice([1, 1, 4, 8])
        # small whole numbers: ties are common and sums are exact
        scores = [[float(rng.randint(0, 6)) for _ in range(rows)] for _ in range(batch)]
        always = [[rng.random() < 0.2 for _ in range(rows)] for _ in range(batch)]
        real = [[not padded or rng.random() < 0.7 for _ in range(rows)] for _ in range(batch)]
        found = select_rows(
            torch.tensor(scores), torch.tensor(always), torch.tensor(real) if padded else None, rule, bucket
        )
        expected = {
            row * rows + i for row in range(batch) for i in passing(scores[row], always[row], real[row], rule, bucket)
        }
        assert found.tolist() == sorted(expected)


def test_the_row_that_crosses_the_line_passes():
    scores = torch.tensor([[5.0, 3.0, 2.0]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    for mass, rows in ((0.49, [0]), (0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2])):
        assert select_rows(scores, none, None, Band(0, mass=mass)).tolist() == rows


def test_a_known_count_gives_the_same_rows():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 9, (2, 30), generator=generator).float()
        always = torch.zeros(2, 30, dtype=torch.bool)
        always[:, :3] = always[:, -5:] = True
        for keep in (0.0, 0.2, 0.5, 0.9):
            slow = select_rows(scores, always, None, Band(0, keep=keep), 4)
            fast = select_rows(scores, always, None, Band(0, keep=keep), 4, always_count=8)
            assert torch.equal(slow, fast)


def test_nan_and_negative_importance_count_as_nothing():
    scores = torch.tensor([[float("nan"), 1.0, -3.0, 2.0]])
    none = torch.zeros(1, 4, dtype=torch.bool)
    assert select_rows(scores, none, None, Band(0, mass=0.99)).tolist() == [1, 3]


# ------------------------------------------------------------------------------------------------------------ schedules


def test_bands_hold_until_the_next_one_and_negative_layers_count_from_the_end():
    schedule = SparseFFNSchedule(mass=0.5, first_layer=2, bands=(Band(-1, keep=0.0), Band(4, keep=0.3)))
    rules = schedule.rules(7)
    assert rules[:2] == [None, None]
    assert [rule.mass for rule in rules[2:4]] == [0.5, 0.5]
    assert [rule.keep for rule in rules[4:]] == [0.3, 0.3, 0.0]


def test_the_default_depth_is_the_last_third_and_dense_rules_are_none():
    assert SparseFFNSchedule(keep=0.3).rules(30) == [None] * 20 + [Band(20, keep=0.3)] * 10
    assert SparseFFNSchedule(mass=1.0, first_layer=0).rules(3) == [None] * 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(), "mass, keep or above_mean"),
        (dict(mass=0.5, keep=0.5), "mass and keep"),
        (dict(mass=1.5), "mass=1.5"),
        (dict(keep=float("nan")), "keep=nan"),
        (dict(keep=True), "keep=True"),
        (dict(first_layer=3, bands=(Band(4, keep=0.5),)), "first_layer without"),
        (dict(keep=0.5, recent=-1), "recent=-1"),
        (dict(keep=0.5, bucket=0), "bucket=0"),
        (dict(keep=0.5, fill="zeros"), "fill='zeros'"),
        (dict(keep=0.5, memory=1.5), "memory=1.5"),
        (dict(keep=0.5, memory=float("nan")), "memory=nan"),
        (dict(keep=0.5, importance="magic"), "importance='magic'"),
        (dict(keep=0.5, bands=(3,)), "bands holds 3"),
    ],
)
def test_bad_schedules_are_refused_by_name(arguments, words):
    with pytest.raises(RedKnotError, match=words.replace("(", r"\(")):
        SparseFFNSchedule(**arguments)


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(RedKnotError, match="layer 9, the model has 4 layers"):
        SparseFFNSchedule(keep=0.5, first_layer=9).rules(4)


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(RedKnotError, match="preset='fast': expected one of"):
        SparseFFNSchedule.preset("fast")


# ------------------------------------------------------------------------------------------- the authors' parameter files

MISTRAL = {"dense_until": 4, "mass_thresh": 0.2, "deep_layer_start": 20, "mass_thresh_deep": 0.05, "recent_n": 128}
MOE = {
    "model": "Qwen3.5-35B-A3B",
    "moe": {"method": "deep_token_sparse_by_attention_mass", "deep_moe_start_layer": 8, "mass_thresh": 0.7},
}


def written(folder, data):
    path = folder / "params.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_file_of_mass_thresholds(tmp_path):
    schedule = SparseFFNSchedule.import_from(written(tmp_path, MISTRAL))
    rules = schedule.rules(32)
    assert [rules.count(rule) for rule in (None, Band(4, mass=0.2), Band(20, mass=0.05))] == [4, 16, 12]
    assert (schedule.recent, schedule.importance, schedule.notes) == (128, "attention_norm", ())


def test_what_a_schedule_cannot_say_is_noted(tmp_path):
    schedule = SparseFFNSchedule.import_from(written(tmp_path, {**MISTRAL, "local_window": 4096}))
    assert "local_window=4096" in schedule.notes[0]
    schedule = SparseFFNSchedule.import_from(written(tmp_path, MOE))
    assert schedule.rules(10) == [None] * 8 + [Band(8, above_mean=0.7)] * 2
    assert schedule.importance == "received_attention" and "shared expert" in schedule.notes[0]


@pytest.mark.parametrize(
    "data, words",
    [
        ("[1, 2]", "expected a JSON object"),
        ("{", "not JSON"),
        ({}, "it lacks deep_layer_start"),
        ({**MISTRAL, "head_class": []}, "it has 'head_class'"),
        ({**MISTRAL, "mass_thresh": 1.5}, "mass_thresh=1.5"),
        ({**MISTRAL, "dense_until": "4"}, "dense_until='4'"),
        ({**MISTRAL, "dense_until": 30}, "deep_layer_start=20 lies before dense_until=30"),
        ({"moe": {"method": "other"}}, "it lacks"),
    ],
)
def test_other_files_are_refused(tmp_path, data, words):
    with pytest.raises(RedKnotError, match=words):
        SparseFFNSchedule.import_from(written(tmp_path, data))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(RedKnotError, match="no such file"):
        SparseFFNSchedule.import_from(tmp_path / "nothing.json")


def test_the_published_files(data_dir):
    folder = data_dir / "heads" / "redknot" / "sparse_ffn_params"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    layers = {"llama-70B": 80, "mistral-7B": 32, "qwen3-32B": 64, "qwen3.5-35B-A3B": 40, "qwen3.5-397B-A17B": 60}
    dense = {"llama-70B": 20, "mistral-7B": 4, "qwen3-32B": 5, "qwen3.5-35B-A3B": 8, "qwen3.5-397B-A17B": 24}
    for name, count in layers.items():
        rules = SparseFFNSchedule.import_from(folder / f"{name}.json").rules(count)
        assert rules.count(None) == dense[name]
