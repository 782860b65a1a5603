"""Every verb on a real model, on simulated devices, in a process of its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_commands import run


def test_classify(efficientnet: Path, imagenet_pictures: list[tuple[Path, int]]) -> None:
    pictures = imagenet_pictures[:3]
    files = [str(path) for path, _ in pictures]
    answer = run("classify", str(efficientnet), *files, "--devices", "2", "--mesh", "data=2", "--top", "3", "--json")
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["mesh"] == {"data": 2}
    assert document["compiles"] == 1
    assert [image["path"] for image in document["images"]] == files
    assert [image["labels"][0]["index"] for image in document["images"]] == [label for _, label in pictures]
    for image in document["images"]:
        scores = [label["score"] for label in image["labels"]]
        assert len(scores) == 3
        assert sorted(scores, reverse=True) == scores

    text = run("classify", "demo:efficientnet-lite0", files[0], "--top", "1")
    assert text.returncode == 0, text.stderr
    assert text.stdout.splitlines()[0] == files[0]
    assert "bull mastiff" in text.stdout
    assert "on mesh" in text.stderr


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_infer(kind: str, efficientnet: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 224, 224, 3)).astype(np.float32)
    batch, output = tmp_path / f"in.{kind}", tmp_path / "out.npz"
    if kind == "npz":
        np.savez(batch, image=images)
    else:
        np.save(batch, images)
    answer = run("infer", str(efficientnet), str(batch), "-o", str(output), "--devices", "4", "--json")
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    with np.load(output) as written:
        (name,) = written.files
        assert document["outputs"][name]["shape"] == [3, 1000] == list(written[name].shape)
        assert document["outputs"][name]["max"] == pytest.approx(float(written[name].max()))
    assert list(tmp_path.glob("*.part")) == []


def test_infer_refuses_what_the_model_does_not_take(efficientnet: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", picture=np.zeros((1, 224, 224, 3), np.float32))
    answer = run("infer", str(efficientnet), str(tmp_path / "in.npz"))
    assert answer.returncode == 4
    assert "picture" in answer.stderr
    assert "image" in answer.stderr
    assert "Traceback" not in answer.stderr

    (tmp_path / "in.npy").write_bytes(b"nonsense")
    answer = run("infer", str(efficientnet), str(tmp_path / "in.npy"))
    assert answer.returncode == 4
    assert "does not hold plain arrays" in answer.stderr


def test_embed_ranks_and_writes(minilm: Path, tmp_path: Path) -> None:
    texts = ["A man plays a guitar.", "The stock market fell.", "Someone is making music."]
    answer = run("embed", str(minilm), *texts, "--query", "a musician performs", "--devices", "2", "--json")
    assert answer.returncode == 0, answer.stderr
    scores = [row["score"] for row in json.loads(answer.stdout)["texts"]]
    assert scores[1] == min(scores)
    assert scores[1] < 0.2 < min(scores[0], scores[2])

    ranked = run("embed", str(minilm), "--query", "a musician performs", stdin="\n".join(texts) + "\n")
    assert ranked.returncode == 0, ranked.stderr
    assert ranked.stdout.splitlines()[-1].endswith(texts[1])

    output = tmp_path / "vectors.npz"
    answer = run("embed", str(minilm), *texts, "-o", str(output))
    assert answer.returncode == 0, answer.stderr
    with np.load(output) as written:
        vectors = written["embeddings"]
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)  # float32 rounding of a norm


def test_a_file_that_cannot_be_written(minilm: Path, tmp_path: Path) -> None:
    output = tmp_path / "absent" / "vectors.npz"
    answer = run("embed", str(minilm), "x", "-o", str(output))
    assert answer.returncode == 4, answer.stderr
    assert f"{output}.part: No such file or directory" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_generate_streams_the_reference_answer(smollm2: Path) -> None:
    command = ["generate", str(smollm2), "The capital of France is", "--max-tokens", "16", "--dtype", "float32"]
    answer = run(*command)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "The capital of France is Paris.\n\nThe answer is: 2018-01\n"

    answer = run(*command, "Water boils at", "--json", "--devices", "2", "--speculate", "ngram:3")
    assert answer.returncode == 0, answer.stderr
    first, second = json.loads(answer.stdout)["completions"]
    assert first["text"] == " Paris.\n\nThe answer is: 2018-01"
    assert len(first["token_ids"]) == 16
    assert first["finish_reason"] == "length"
    assert second["prompt"] == "Water boils at"
    assert 0 <= second["accepted_tokens"] <= second["drafted_tokens"]


@pytest.mark.parametrize(("asked", "message"), [("draft", "takes ngram or ngram:K"), ("ngram:99", "1 to 16 drafts")])
def test_generate_refuses_other_drafts(asked: str, message: str) -> None:
    answer = run("generate", "demo:smollm2", "x", "--speculate", asked)
    assert answer.returncode == 4
    assert message in answer.stderr


def test_plan_shows_the_choice_and_the_rejected(smollm2: Path) -> None:
    answer = run("plan", str(smollm2), "--devices", "8")
    assert answer.returncode == 0, answer.stderr
    for mesh in ("data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8"):
        assert mesh in answer.stdout
    assert "chosen" in answer.stdout

    document = json.loads(run("plan", str(smollm2), "--devices", "16xH100", "--hosts", "2", "--json").stdout)
    assert document["devices"] == {"kind": "h100", "count": 16, "hosts": 2}
    meshes = {tuple(candidate["mesh"].items()) for candidate in document["candidates"]}
    assert len(meshes) == 5  # 16 devices as data x model, each under several layouts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=3,model=5", "--devices", "8"], "mesh data=3,model=5 has 15 places"),
        (["--mesh", "date=8", "--devices", "8"], "unknown mesh axis 'date'"),
    ],
)
def test_meshes_that_cannot_be(arguments: list[str], message: str, minilm: Path) -> None:
    answer = run("embed", str(minilm), "x", *arguments)
    assert answer.returncode == 5, answer.stderr
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_verb_that_the_model_does_not_offer(minilm: Path) -> None:
    answer = run("generate", str(minilm), "x")
    assert answer.returncode == 4
    assert "the loaded model cannot generate" in answer.stderr


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        answer = run("embed", str(path), "x")
        assert answer.returncode == 3, answer.stderr
        assert str(path) in answer.stderr
        assert "Traceback" not in answer.stderr
