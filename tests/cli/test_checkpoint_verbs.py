"""``convert``, ``reshard``, ``inspect``, ``diff`` and ``verify`` as a user meets them."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

COMMAND = [sys.executable, "-c", "from spmd_infer.cli import main; main()"]


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    return ended


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    rng = np.random.default_rng(4)
    tensors = {f"layers.{i}.weight": rng.normal(size=(256, 128)).astype(np.float32) for i in range(3)}
    save_file(tensors | {"bias": np.zeros(128, np.float16)}, path)
    return path


def test_reshard_predicts_and_then_does_it(minilm: Path, tmp_path: Path) -> None:
    arguments = ("reshard", minilm, tmp_path / "out", "--mesh", "data=2,model=4", "--hosts", "2")
    planned = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    assert planned["disk_bytes"] == planned["read_bytes"] > 90_000_000
    assert planned["peak_memory_bytes"] <= planned["largest_tensor_bytes"] + (512 << 20)
    assert planned["seconds"] > 0
    done = json.loads(run(*arguments, "--json").stdout)
    assert (done["bytes"], done["mesh"], done["hosts"]) == (planned["disk_bytes"], {"data": 2, "model": 4}, 2)
    said = run("verify", tmp_path / "out").stderr
    assert "nothing is wrong with 104 tensors: digests match" in said
    assert "all 104 tensors are the same" in run("diff", minilm, tmp_path / "out").stderr
    run("convert", tmp_path / "out", tmp_path / "hf", "--to", "huggingface")
    assert json.loads(run("diff", minilm, tmp_path / "hf", "--json").stdout) == {"equal": True, "differences": []}


def test_an_existing_target_is_refused(own: Path, tmp_path: Path) -> None:
    run("convert", own, tmp_path / "out")
    assert "exists; choose another name" in run("convert", own, tmp_path / "out", code=3).stderr
    run("convert", own, tmp_path / "out", "--overwrite")


def test_verify_names_what_is_damaged(own: Path, tmp_path: Path) -> None:
    run("convert", own, tmp_path / "out")
    data = tmp_path / "out" / "data" / "host-0000-0000.bin"
    content = bytearray(data.read_bytes())
    content[200_000] ^= 4
    data.write_bytes(content)
    report = json.loads(run("verify", tmp_path / "out", "--json", code=6).stdout)
    (problem,) = report["problems"]
    assert (problem["tensor"], problem["offset"], problem["kind"]) == ("layers.1.weight", 131_072, "damaged")
    assert problem["file"] == str(data)
    data.write_bytes(bytes(content[:-5]))
    assert "has 393467 bytes, expected 393472" in run("verify", tmp_path / "out", code=6).stdout
    data.unlink()
    assert "is missing" in run("verify", tmp_path / "out", code=6).stdout


def test_verify_looks_at_dtypes_and_values_of_any_format(tmp_path: Path) -> None:
    save_file({"a": np.array([1, np.nan], np.float32), "b": np.ones(2, np.float16)}, tmp_path / "x.safetensors")
    report = json.loads(run("verify", tmp_path / "x.safetensors", "--dtype", "float32", "--json", code=6).stdout)
    assert [(each["tensor"], each["kind"]) for each in report["problems"]] == [("a", "values"), ("b", "dtype")]
    assert report["digests"] is False


def test_diff_says_which_and_by_how_much(own: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(own)
    tensors["layers.1.weight"][7, 9] += 0.5
    del tensors["layers.2.weight"]
    tensors["bias"] = tensors["bias"].astype(np.float32)
    save_file(tensors, tmp_path / "other.safetensors")
    found = json.loads(run("diff", own, tmp_path / "other.safetensors", "--json", code=6).stdout)["differences"]
    rows = {each["name"]: each for each in found}
    assert rows["layers.1.weight"]["differing"] == 1
    assert rows["layers.1.weight"]["first"] == [7, 9]
    assert rows["layers.1.weight"]["largest"] == pytest.approx(0.5, abs=1e-6)
    assert rows["layers.2.weight"]["what"] == "only in A"
    assert rows["bias"]["what"] == "dtype"
    assert len(rows) == 3
    assert "3 of 4 tensors differ" in run("diff", own, tmp_path / "other.safetensors", code=6).stderr


def test_inspect_shows_tensors_and_hosts(minilm: Path) -> None:
    text = run("inspect", minilm, "--depth", "1").stdout
    assert "safetensors, BertModel, 104 tensors, 22.7 million parameters" in text
    listed = json.loads(run("inspect", minilm, "--mesh", "data=1,model=4", "--hosts", "2", "--json").stdout)
    (query,) = [row for row in listed["tensors"] if row["name"] == "encoder.layer.0.attention.self.query.weight"]
    assert (query["axes"], query["split"], query["piece"]) == (["heads", "embed"], 4, [96, 384])
    assert len(listed["host_bytes"]) == 2
    assert "× [96, 384]" in run("inspect", minilm, "--mesh", "data=1,model=4", "--tensors").stdout


def test_inspect_draws_where_the_bytes_are(own: Path, tmp_path: Path) -> None:
    run("inspect", own, "--picture", tmp_path / "map.svg")
    picture = ET.parse(tmp_path / "map.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    tiles = {
        (group.findtext(space + "title") or "").split(",")[0]: group.find(space + "rect")
        for group in picture.iter(space + "g")
    }
    area = {name: float(r.get("width", 0)) * float(r.get("height", 0)) for name, r in tiles.items() if r is not None}
    # The bias has 256 of 393,472 bytes; headings and gaps take a little from the rest.
    assert area["layers"] > 0.97 * area["own.safetensors"]
    assert area["0"] == pytest.approx(area["1"], rel=0.1)
    run("inspect", own, "--picture", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (1200, 800)
        assert len(image.getcolors(1 << 20) or ()) > 3
    assert "ends in .svg or .png" in run("inspect", own, "--picture", tmp_path / "map.gif", code=3).stderr


def sparse_70b(folder: Path) -> int:
    """A folder of Llama 70B's shapes, its headers written and its data a hole; returns its bytes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 8192)}
    for layer in range(80):
        start = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
            "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
            "mlp.down_proj": (8192, 28672), "input_layernorm": (8192,), "post_attention_layernorm": (8192,),
        }.items():  # fmt: skip
            shapes[f"{start}{name}.weight"] = shape
    shapes |= {"model.norm.weight": (8192,), "lm_head.weight": (128256, 8192)}
    files, names = 30, list(shapes)
    total, weight_map = 0, {}
    for number in range(files):
        header, offset = {}, 0
        file = folder / f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        for name in names[number::files]:
            nbytes = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + offset)
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return total


def test_a_70b_checkpoint_is_inspected_within_two_seconds(tmp_path: Path) -> None:
    total = sparse_70b(tmp_path)
    assert total > 140e9
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        answer = run("inspect", tmp_path, "--json")
        seconds.append(time.perf_counter() - begin)
    assert json.loads(answer.stdout)["bytes"] == total
    assert min(seconds) < 2.0, seconds
    planned = json.loads(
        run(
            "reshard", tmp_path, tmp_path / "out", "--mesh", "data=2,model=8", "--hosts", "4", "--dry-run", "--json"
        ).stdout
    )
    assert planned["disk_bytes"] == total
    assert planned["peak_memory_bytes"] <= planned["largest_tensor_bytes"] + (512 << 20)


def without_jax(*arguments: str | Path) -> None:
    program = (
        "import sys; from spmd_infer.cli import main; sys.argv[0] = 'spmd-infer'\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "sys.exit('jax' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr or "jax was imported"


def test_nothing_of_jax_is_needed_to_look(own: Path) -> None:
    without_jax("inspect", own)


def test_nothing_of_jax_is_needed_for_a_native_checkpoint(minilm: Path, tmp_path: Path) -> None:
    """It says itself how its tensors may be split; its model is not built to find that out again."""
    by_model, by_itself = tmp_path / "first", tmp_path / "second"
    run("reshard", minilm, by_model, "--mesh", "data=2,model=4", "--hosts", "2")
    without_jax("inspect", by_model, "--mesh", "data=1,model=2")
    without_jax("reshard", by_model, tmp_path / "between", "--mesh", "data=8,model=1", "--hosts", "8")
    without_jax("reshard", tmp_path / "between", by_itself, "--mesh", "data=2,model=4", "--hosts", "2")
    without_jax("verify", by_itself)
    without_jax("diff", by_model, by_itself)
    first, second = (json.loads((path / "manifest.json").read_text()) for path in (by_model, by_itself))
    for key in ("arrays", "data", "model"):
        assert first[key] == second[key]
