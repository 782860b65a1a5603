"""Exported Hugging Face folders give the same numbers in transformers as the original does."""

from pathlib import Path

import numpy as np
import pytest

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.conversion import prepare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
IDS = [[504, 3575, 282, 4649, 314, 7042, 30, 657, 436, 253]]


def exported(source: Path, tmp_path: Path) -> Path:
    """By way of the native store."""
    prepare(open_checkpoint(source)).run(tmp_path / "native", "convert")
    prepare(open_checkpoint(tmp_path / "native"), to="huggingface").run(tmp_path / "hf", "convert")
    return tmp_path / "hf"


def test_smollm2_gives_the_same_logits(smollm2: Path, tmp_path: Path) -> None:
    folder = exported(smollm2, tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    with torch.no_grad():
        wanted, found = theirs(torch.tensor(IDS)).logits, ours(torch.tensor(IDS)).logits
    # The weights are the same numbers; what is left is the order of float32 sums.
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-4)


def test_minilm_gives_the_same_states(minilm: Path, tmp_path: Path) -> None:
    folder = exported(minilm, tmp_path)
    ours = transformers.AutoModel.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(minilm)
    ids = torch.tensor([[101, 1037, 4049, 2006, 1996, 2697, 102]])
    with torch.no_grad():
        wanted, found = theirs(ids), ours(ids)
    weights = theirs.state_dict()
    assert ours.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    # The same numbers may be summed in another order, where a weight's memory is aligned otherwise.
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, atol=1e-6, rtol=1e-5)
