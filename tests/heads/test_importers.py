"""Foreign head maps: small hand-written files of each format, hostile ones, and the published files where present."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redknot_hf.errors import RedKnotError
from redknot_hf.heads import HeadProfile


def write(tmp_path, content, name="map.json"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---------------------------------------------------------------- RedKnot

REDKNOT = {
    "num_layers": 3,
    "num_kv_heads": 2,
    "window": 100,
    "sink_size": 6,
    "kv_head_classification": [["local_full", "global"], ["retrieval", "limited"], ["dense", "streaming"]],
    "kv_head_max_distance": [[50, 4096], [-1, -1], [0, 70]],
    "model": "owner/name",
}


def test_redknot_aliases_missing_sinks_and_stale_distances(tmp_path):
    profile = HeadProfile.import_from(write(tmp_path, REDKNOT))
    assert profile.head_class == [["local", "global"], ["retrieval", "local"], ["dense", "local"]]
    assert profile.window == [[50, 0], [0, 100], [0, 70]]  # -1 on a local head: the file's window
    assert profile.sink == [[6, 0], [0, 6], [0, 6]]
    assert profile.metadata["model"] == "owner/name"
    imported = profile.metadata["imported_from"]
    assert imported == {"format": "redknot", "file": "map.json", "stale_distances_ignored": 1}
    profile.save(tmp_path / "p.json")
    assert HeadProfile.load(tmp_path / "p.json") == profile


def test_redknot_defaults_and_dense_prefix(tmp_path):
    bare = {
        "kv_head_classification": [["local", "local"], ["sink_dominant", "global"]],
        "kv_head_sink_size": [[1, 2], [3, 9]],
        "dense_prefix_layers": 1,
    }
    profile = HeadProfile.import_from(write(tmp_path, bare))
    assert profile.head_class == [["dense", "dense"], ["local", "global"]]
    assert profile.sink == [[0, 0], [3, 0]] and profile.window == [[0, 0], [512, 0]]
    del bare["kv_head_sink_size"]
    assert HeadProfile.import_from(write(tmp_path, bare)).sink[1] == [4, 0]


def test_redknot_hybrid_rows_go_to_their_layers(tmp_path):
    hybrid = {**REDKNOT, "full_attention_layers": [1, 3, 5], "dense_prefix_layers": 1}
    profile = HeadProfile.import_from(write(tmp_path, hybrid))
    assert profile.num_layers == 6 and profile.attention_layers == [1, 3, 5]
    assert profile.head_class[1] == ["dense", "dense"] and profile.head_class[3] == ["retrieval", "local"]
    assert profile.window[5] == [0, 70] and profile.stored_tokens(1000)[4] == [0, 0]
    assert HeadProfile.import_from(write(tmp_path, hybrid), num_layers=8).num_layers == 8
    with pytest.raises(RedKnotError, match="num_layers is 4"):
        HeadProfile.import_from(write(tmp_path, hybrid), num_layers=4)
    same = HeadProfile.import_from(write(tmp_path, REDKNOT), attention_layers=[1, 3, 5])
    assert same.window[5] == [0, 70]
    with pytest.raises(RedKnotError, match="pass attention_layers="):
        HeadProfile.import_from(write(tmp_path, REDKNOT), num_layers=6)


def test_redknot_query_head_map_needs_to_know_the_attention_layers(tmp_path):
    rows = [[False] * 4, [False, True, False, False], [True] * 4]
    query_map = {"num_kv_heads": 2, "head_map": rows, "params": {"full_window_size": 33}}
    path = write(tmp_path, query_map)
    with pytest.raises(RedKnotError, match="pass attention_layers="):
        HeadProfile.import_from(path)
    profile = HeadProfile.import_from(path, attention_layers=[1, 2])
    assert profile.head_class[1:] == [["global", "local"], ["global", "global"]]
    assert profile.window[1] == [0, 33] and profile.attention_layers == [1, 2]
    with pytest.raises(RedKnotError, match="does not fit"):
        HeadProfile.import_from(path, attention_layers=[1, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_head_classification": [["glboal", "local"]] * 3}, r"\[0\]\[0\] is 'glboal'; .*'local_full'"),
        ({"kv_head_classification": [["local", "local"], ["local"]]}, r"kv_head_classification\[1\] is \['local'\]"),
        ({"kv_head_classification": []}, r"kv_head_classification is \[\]"),
        ({"kv_head_classification": [[]]}, r"kv_head_classification\[0\]"),
        ({"kv_head_classification": "all"}, "kv_head_classification is 'all'"),
        ({"kv_head_classification": [[["local"], "local"]] * 3}, r"kv_head_classification\[0\]\[0\]"),
        ({"num_layers": 4}, "3 x 2, but the file's num_layers is 4"),
        ({"num_kv_heads": "2"}, "num_kv_heads is '2'"),
        ({"kv_head_max_distance": [[1, 2]]}, "kv_head_max_distance has 1 rows; expected 3"),
        ({"kv_head_max_distance": [[1.5, 2]] * 3}, r"kv_head_max_distance\[0\]\[0\] is 1\.5"),
        ({"kv_head_max_distance": [[2**40, 2]] * 3}, r"kv_head_max_distance\[0\]\[0\]"),
        ({"kv_head_sink_size": [[-1, 2]] * 3}, r"kv_head_sink_size\[0\]\[0\] is -1"),
        ({"window": 0}, "window is 0"),
        ({"sink_size": None}, "sink_size is None"),
        ({"dense_prefix_layers": -1}, "dense_prefix_layers is -1"),
        ({"full_attention_layers": [1, 2]}, "expected 3 increasing layer numbers"),
        ({"full_attention_layers": [3, 2, 1]}, "full_attention_layers"),
        ({"full_attention_layers": [1, 2, 10**9]}, r"full_attention_layers\[2\]"),
        ({"full_attention_layers": "all"}, "full_attention_layers is 'all'"),
        ({"mla_head_classification": [], "physical_kv_heads": 1}, "MLA model.*one latent KV"),
        ({"index_topk_per_layer": []}, "indexer.*not a head map"),
    ],
)  # fmt: skip
def test_redknot_bad_files_are_named(tmp_path, change, message):
    with pytest.raises(RedKnotError, match=message) as error:
        HeadProfile.import_from(write(tmp_path, {**REDKNOT, **change}))
    assert "\n" not in str(error.value)


def test_redknot_files_that_are_not_head_maps(tmp_path):
    for content, message in (
        ({"dense_until": 4, "mass_thresh": 0.2}, "sparse-FFN"),
        ({"component": "linear_attention"}, "linear-attention schedule"),
        ({"full_attention_layers": [3], "frac_global": 0.4}, "lists none.*_server.json"),
    ):
        with pytest.raises(RedKnotError, match=message):
            HeadProfile.import_from(write(tmp_path, content))


# ---------------------------------------------------------------- DuoAttention

GATES = "1.0\t0.4\t-0.001\t0.6\n0.5\t0.5\t0.3\t0.2\n"


def duo(tmp_path, gates=GATES, config=None):
    config = {"sink_size": 128, "recent_size": 256, "threshold": 0.5, "sparsity": None, "model_name": "models/M",
              "seed": 42} if config is None else config  # fmt: skip
    write(tmp_path, gates, "full_attention_heads.tsv")
    return write(tmp_path, config, "config.json").parent


def test_duo_attention_threshold_and_sparsity(tmp_path):
    directory = duo(tmp_path)
    by_threshold = HeadProfile.import_from(directory)
    assert by_threshold.head_class == [["global", "local", "local", "global"], ["global", "global", "local", "local"]]
    assert by_threshold.sink == [[0, 128, 128, 0], [0, 0, 128, 128]] and by_threshold.window[1] == [0, 0, 256, 256]
    assert by_threshold.metadata["scores"]["gate"][0] == [1.0, 0.4, 0.0, 0.6]
    assert by_threshold.metadata["model"] == "M" and by_threshold.metadata["imported_from"]["threshold"] == 0.5
    # A tie at 0.5 with one place left: the earlier head gets it.
    by_sparsity = HeadProfile.import_from(directory / "full_attention_heads.tsv", sparsity=0.625, window=9, sink=0)
    assert by_sparsity.head_class == [["global", "local", "local", "global"], ["global", "local", "local", "local"]]
    assert by_sparsity.window[0] == [0, 9, 9, 0] and by_sparsity.sink[0] == [0, 0, 0, 0]
    assert HeadProfile.import_from(directory / "config.json", threshold=0.9).count("global") == 1
    assert HeadProfile.import_from(directory, "duo_attention", sparsity=1).count("global") == 0
    deployed = duo(tmp_path / "x", config={"sink_size": 1, "recent_size": 2, "sparsity": 0.75})
    assert HeadProfile.import_from(deployed).count("global") == 2


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("", "is empty"),
        ("1.0\t0.5\n0.5\n", "line 2 has 1 gates; the lines above have 2"),
        ("1.0\tx\n", "line 1, column 2 is 'x'"),
        ("1.0\tnan\n", "line 1, column 2 is 'nan'"),
        ("inf\n", "line 1, column 1"),
        ("256\t256\n", "column 1 is '256'; expected a gate from 0 to 1"),
    ],
)
def test_duo_attention_bad_gates_are_named(tmp_path, gates, message):
    with pytest.raises(RedKnotError, match=message):
        HeadProfile.import_from(duo(tmp_path, gates))


def test_duo_attention_bad_configs_and_options(tmp_path):
    directory = duo(tmp_path)
    with pytest.raises(RedKnotError, match="threshold= or sparsity="):
        HeadProfile.import_from(directory, sparsity=0.5, threshold=0.5)
    bad_options = [
        ({"sparsity": 2}, "sparsity is 2"),
        ({"threshold": "x"}, "threshold is 'x'"),
        ({"window": 0}, "window is 0"),
        ({"rule": 1}, "no option 'rule'; it has threshold"),
    ]
    for options, message in bad_options:
        with pytest.raises(RedKnotError, match=message):
            HeadProfile.import_from(directory, **options)
    bad_configs = [
        ([], "expected an object"),
        ({}, "'sink_size'.*pass sink="),
        ({"sink_size": -1}, "sink_size is -1"),
        ({"sink_size": 1, "recent_size": "2"}, "recent_size is '2'"),
        ({"sink_size": 1, "recent_size": 2, "threshold": []}, "threshold is"),
    ]
    for config, message in bad_configs:
        with pytest.raises(RedKnotError, match=message):
            HeadProfile.import_from(duo(tmp_path, config=config))
    (tmp_path / "config.json").unlink()
    assert HeadProfile.import_from(tmp_path, sink=1, window=2).count("global") == 4
    with pytest.raises(RedKnotError, match="no such file or directory"):
        HeadProfile.import_from(tmp_path / "nowhere", "duo_attention")


# ---------------------------------------------------------------- HeadKV


def test_headkv_query_scores_become_kv_heads(tmp_path):
    scores = {
        f"{l}-{h}": [value, value] for l, row in enumerate([[0, 9, 2, 3], [4, 4, 1, 0]]) for h, value in enumerate(row)
    }
    path = write(tmp_path, scores)
    by_max = HeadProfile.import_from(path, num_kv_heads=2, fraction=0.25, sink=2, window=64)
    assert by_max.head_class == [["global", "local"], ["local", "local"]]
    assert by_max.metadata["scores"]["retrieval_reasoning"] == [[9.0, 3.0], [4.0, 1.0]]
    assert by_max.sink[0] == [0, 2] and by_max.window[1] == [64, 64]
    by_mean = HeadProfile.import_from(path, num_kv_heads=2, fraction=0.5, reduce="mean")
    assert by_mean.metadata["scores"]["retrieval_reasoning"] == [[4.5, 2.5], [4.0, 0.5]]
    assert by_mean.head_class == [["global", "local"], ["global", "local"]]
    packed = tmp_path / "scores.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert HeadProfile.import_from(packed, num_kv_heads=2, fraction=0.25).head_class == by_max.head_class
    for options, message in (({}, "pass num_kv_heads="), ({"num_kv_heads": 3}, "does not divide the 4"),
                             ({"num_kv_heads": 2, "reduce": "sum"}, "reduce is 'sum'"),
                             ({"num_kv_heads": 2, "fraction": -1}, "fraction is -1"),
                             ({"num_kv_heads": 2, "window": 0, "fraction": 1}, "window is 0")):  # fmt: skip
        with pytest.raises(RedKnotError, match=message):
            HeadProfile.import_from(path, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0-0": [1], "0-2": [1]}, "0-1 is missing"),
        ({"0-0": [1], "9999-9999": [1]}, "0-1 is missing"),
        ({"0-0": []}, "head 0-0 has no scores"),
        ({"0-0": ["a"]}, "score 'a' of head 0-0"),
        ({"0-0": [True]}, "score True"),
        ({"0-0": [1], "00-0": [2]}, "head 00-0 appears twice"),
        ({"0-0": None}, "score None"),
    ],
)
def test_headkv_bad_files_are_named(tmp_path, content, message):
    with pytest.raises(RedKnotError, match=message):
        HeadProfile.import_from(write(tmp_path, content), num_kv_heads=1)


# ---------------------------------------------------------------- MInference


def test_minference_only_a_shape_groups_become_local(tmp_path):
    a, v, b = ["stream_llm", 100, 800, 0.9], ["vertical_and_slash", 1000, 6096, 0.5], ["block_sparse", 100, 1000]
    wide = ["stream_llm", 50, 900, 0.9]
    layers = [dict(zip("0123", row, strict=True)) for row in ([a, wide, a, v], [v, v, b, a])]
    profile = HeadProfile.import_from(write(tmp_path, layers), num_kv_heads=2)
    assert profile.head_class == [["local", "global"], ["global", "global"]]
    assert profile.sink[0] == [100, 0] and profile.window[0] == [900, 0]
    with pytest.raises(RedKnotError, match="pass num_kv_heads="):
        HeadProfile.import_from(write(tmp_path, layers))
    bad_cells = [
        (["tri_shape", 1, 2, 3], "layer 1, head 3 is 'tri_shape'"),
        (["stream_llm", -1, 2, 0], "size 1 is -1"),
        (["stream_llm", 1, 0, 0], "window is 0"),
        (["stream_llm"], "layer 1, head 3"),
        (None, "is missing"),
    ]
    for cell, message in bad_cells:
        bad = [layers[0], {**layers[1], "3": cell}]
        with pytest.raises(RedKnotError, match=message):
            HeadProfile.import_from(write(tmp_path, bad), num_kv_heads=2)
    with pytest.raises(RedKnotError, match="layer 1 has 3 query heads; layer 0 has 4"):
        HeadProfile.import_from(write(tmp_path, [layers[0], {k: a for k in "012"}]), num_kv_heads=2)


# ---------------------------------------------------------------- all of them


def test_unknown_files_and_formats(tmp_path):
    for content in ({}, [], 3, "x", None, {"a": 1}, [{}], [[]]):
        with pytest.raises(RedKnotError, match="neither a redknot-hf profile nor one of"):
            HeadProfile.import_from(write(tmp_path, json.dumps(content)))
    with pytest.raises(RedKnotError, match="format is 'gguf'; expected 'auto' or one of 'redknot'"):
        HeadProfile.import_from("x", "gguf")
    with pytest.raises(RedKnotError, match="no such file"):
        HeadProfile.import_from(tmp_path / "missing.json")
    (tmp_path / "bad.json.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(RedKnotError, match="cannot"):
        HeadProfile.import_from(tmp_path / "bad.json.gz")
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b"0" * 50_000_000))
    with pytest.raises(RedKnotError, match="larger than"):
        HeadProfile.import_from(tmp_path / "bomb.json.gz")


def test_own_format_is_read_too(tmp_path):
    profile = HeadProfile.import_from(write(tmp_path, REDKNOT))
    path = profile.save(tmp_path / "own.json")
    assert HeadProfile.import_from(path) == profile
    with pytest.raises(RedKnotError, match="takes no import options"):
        HeadProfile.import_from(path, num_kv_heads=2)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.sampled_from(["local", "stream_llm", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "0-0", "0-1", "model"]), inner)
    ),
    max_leaves=10,
)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    format=st.sampled_from(["redknot", "headkv", "minference", "auto"]),
    key=st.sampled_from(list(REDKNOT)),
    value=anything,
    whole=st.booleans(),
)
def test_any_json_is_a_profile_or_a_redknot_error(tmp_path, format, key, value, whole):
    content = value if whole else {**REDKNOT, key: value}
    options = {"num_kv_heads": 1} if format in ("headkv", "minference") else {}
    try:
        HeadProfile.import_from(write(tmp_path, content), format, **options).validate()
    except RedKnotError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------- published files

OFFICIAL = {
    "llama-70B_optimal_g15_lf_ret.json": (80, 8, {"local": 560, "retrieval": 40, "global": 40}, {8192}),
    "llama-70B_sweetspot_g10_w4096.json": (80, 8, {"local": 576, "global": 64}, {4096}),
    "mistral-7B_optimal_g15_lf_ret.json": (32, 8, {"global": 160, "local": 96}, {4096}),
    "mistral-7B_parity_98local_w3000.json": (32, 8, {"local": 251, "global": 5}, {3000}),
    "qwen3-32B_ablation_allglobal.json": (64, 8, {"global": 512}, set()),
    "qwen3-32B_optimal_g15_lf_ret.json": (64, 8, {"local": 435, "global": 48, "retrieval": 29}, {4096}),
    "qwen3.5-35B-A3B_redknot_server.json": (40, 2, {"dense": 10, "local": 7, "global": 3}, {4096}),
    "qwen3.5-397B-A17B_redknot_server.json": (60, 2, {"dense": 18, "local": 6, "global": 6}, {2048}),
}
REFUSED = {
    "dsv4_extreme_local128.json": "MLA",
    "dsv4_safe_stride8.json": "MLA",
    "dsv4pro_mla_head_config_smoke.json": "MLA",
    "dsv4pro_indexer_topk.json": "indexer",
    "qwen3.5-35B-A3B_head_map.json": "attention_layers=",
    "qwen3.5-35B-A3B_redknot.json": "_server.json",
    "qwen3.5-397B-A17B_redknot.json": "_server.json",
}


def test_every_official_file_is_read_or_refused_by_name(data_dir, tmp_path):
    folder = data_dir / "heads" / "redknot"
    assert {path.name for path in folder.glob("*.json")} == OFFICIAL.keys() | REFUSED.keys()
    for name, (layers, heads, classes, windows) in OFFICIAL.items():
        profile = HeadProfile.import_from(folder / name)
        assert (profile.num_layers, profile.num_kv_heads) == (layers, heads), name
        assert {c: profile.count(c) for c in classes} == classes
        assert sum(classes.values()) == len(profile.attention_layers) * heads
        local = np.array(profile.head_class) == "local"
        assert set(np.array(profile.window)[local].tolist()) == windows
        assert set(np.array(profile.sink)[local].tolist()) <= {4}
        assert profile.save(tmp_path / name).stat().st_size < 5_000
        assert HeadProfile.load(tmp_path / name) == profile
    for name, message in REFUSED.items():
        with pytest.raises(RedKnotError, match=message):
            HeadProfile.import_from(folder / name)
    for path in (folder / "sparse_ffn_params").glob("*.json"):
        with pytest.raises(RedKnotError, match="not a head map"):
            HeadProfile.import_from(path)
    hybrid = HeadProfile.import_from(folder / "qwen3.5-35B-A3B_redknot_server.json")
    assert hybrid.attention_layers == list(range(3, 40, 4))
    assert hybrid.head_class[23] == ["local", "local"] and hybrid.head_class[27] == ["local", "global"]
    probed = HeadProfile.import_from(folder / "qwen3.5-35B-A3B_head_map.json", attention_layers=range(3, 40, 4))
    assert probed.attention_layers == list(range(3, 40, 4)) and probed.head_class[3] == ["global", "global"]


def test_every_duo_attention_file(data_dir):
    counts = {}
    for path in sorted((data_dir / "heads" / "duo_attention").glob("*/*/full_attention_heads.tsv")):
        gates = np.loadtxt(path)
        profile = HeadProfile.import_from(path.parent)
        assert (np.array(profile.head_class) == "global").tolist() == (gates >= 0.5).tolist()
        assert {s for row in profile.sink for s in row} == {0, 128} and {w for row in profile.window for w in row} == {
            0,
            256,
        }
        half = HeadProfile.import_from(path, sparsity=0.5)
        assert half.count("global") == gates.size // 2
        counts[profile.metadata["model"]] = profile.count("global")
    assert counts == {"Llama-2-7B-32K-Instruct": 446, "Llama-3-8B-Instruct-Gradient-1048k": 208,
                      "Llama-3-8B-Instruct-Gradient-4194k": 208, "Meta-Llama-3.1-8B-Instruct": 234,
                      "Mistral-7B-Instruct-v0.2": 244, "Mistral-7B-Instruct-v0.3": 240}  # fmt: skip


def test_every_headkv_file(data_dir):
    paths = sorted((data_dir / "heads" / "headkv").glob("*.json.gz"))
    assert len(paths) == 2
    for path in paths:
        with gzip.open(path) as file:
            raw = json.load(file)
        means = np.array([[np.mean(raw[f"{l}-{h}"]) for h in range(32)] for l in range(32)])
        profile = HeadProfile.import_from(path, num_kv_heads=8, fraction=0.25)
        groups = means.reshape(32, 8, 4).max(axis=2)
        assert np.allclose(profile.metadata["scores"]["retrieval_reasoning"], groups)
        assert profile.count("global") == 64
        kept = np.array(profile.head_class) == "global"
        assert groups[kept].min() >= groups[~kept].max()
